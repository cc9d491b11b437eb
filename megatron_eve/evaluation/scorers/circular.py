"""MMBench, circular: each question is asked once for each of its options, in rotated order; all have to be right.

Source: VLMEvalKit e8e78f0, vlmeval/dataset/utils/multiple_choice.py and vlmeval/utils/matching_util.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_eve.data.errors import DataError
from megatron_eve.data.text.questions import LETTERS
from megatron_eve.evaluation.scorers.scores import (
    Score,
    bad_label,
    counted,
    no_answers,
    require_rows,
)

ROTATION = 1_000_000
"""The row of a question's r-th rotation has the question's index + r times this."""
# May stand around the letter of an option.
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_MOST_WORDS_BESIDE_A = 3  # in a longer answer "A" may be an article


@dataclass(frozen=True)
class CircularRow:
    """One rotation of a question.

    Attributes:
        index: of the question, plus `ROTATION` times the number of the rotation.
        category: of the question, such as "object_localization".
        options: letter -> text, of the options that the question has.
        label: letter of the right option.
        answer: the model's; None if it gave none.
    """

    index: int
    category: str
    options: Mapping[str, str]
    label: str
    answer: str | None


@dataclass(frozen=True)
class CircularScore:
    """Accuracy by question (`score`, in the order in which questions came first), and the same by category."""

    score: Score
    categories: dict[str, Score]


def option_of(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer names, or None.

    One option's letter as a word, alone or with punctuation around it; else the one option whose text stands in the
    answer, in any case. "A" in an answer of more than three words may be an article and is not taken for a letter.
    """
    words = answer.translate(_PUNCTUATION).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and not (letters == ["A"] and len(words) > _MOST_WORDS_BESIDE_A):
        return letters[0]
    contained = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return contained[0] if len(contained) == 1 else None


def score_circular(task: str, rows: Sequence[CircularRow]) -> CircularScore:
    """Accuracy by question: a question counts if the answers to all its rotations are right.

    Raises:
        DataError: no rows, a label that is not among the options, an option without text, or a question whose
            rotations are not there once each; names task, row and value.
    """
    require_rows(task, rows)
    questions: dict[int, dict[int, CircularRow]] = {}
    for row in rows:
        _check_row(task, row)
        rotation, index = divmod(row.index, ROTATION)
        rotations = questions.setdefault(index, {})
        if rotation in rotations:
            raise DataError(f"{task}: question {row.index} is there twice; get the dataset again")
        rotations[rotation] = row
    points: dict[int, float] = {}
    for index, rotations in questions.items():
        _check_rotations(task, index, rotations)
        points[index] = float(all(_chosen(row) == row.label for row in rotations.values()))
    by_category: dict[str, list[float]] = {}
    for index, rotations in questions.items():
        by_category.setdefault(rotations[0].category, []).append(points[index])
    unread = sum(row.answer is not None and _chosen(row) is None for row in rows)
    notes = (
        *no_answers([row.answer for row in rows]),
        *counted("answers", unread, "they name no option, or several: scored as wrong"),
    )
    categories = {name: Score(tuple(found)) for name, found in by_category.items()}
    return CircularScore(Score(tuple(points.values()), notes), categories)


def is_right(row: CircularRow) -> bool:
    """Does the answer to one rotation name the right option?"""
    return _chosen(row) == row.label


def _chosen(row: CircularRow) -> str | None:
    return None if row.answer is None else option_of(row.answer, row.options)


def _check_row(task: str, row: CircularRow) -> None:
    if row.label not in row.options:
        raise bad_label(task, row.index, row.label, f"write one of {', '.join(row.options)}")
    for letter, text in row.options.items():
        if letter not in tuple(LETTERS) or not isinstance(text, str) or not text:
            raise bad_label(task, row.index, {letter: text}, "give each option a letter and a text")


def _check_rotations(task: str, index: int, rotations: Mapping[int, CircularRow]) -> None:
    """One row for each option: rotations 0 to k - 1 for the k options that each row has."""
    options = len(next(iter(rotations.values())).options)
    for rotation in range(options):
        if rotation not in rotations:
            raise DataError(
                f"{task}, question {index}: has {options} options, but row {index + rotation * ROTATION}, its "
                f"rotation {rotation}, is missing; get the dataset again"
            )
    for rotation, row in rotations.items():
        if rotation >= options or len(row.options) != options:
            raise DataError(
                f"{task}, question {index}: row {row.index}, its rotation {rotation}, has {len(row.options)} options "
                f"where another row has {options}; get the dataset again"
            )
