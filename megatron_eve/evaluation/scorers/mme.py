"""MME: two questions about each picture, to be answered yes or no, in fourteen categories.

Source: the benchmark's eval_tool/calculation.py, with the reading of answers of lmms-eval 0.7.3, tasks/mme/utils.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.scorers.scores import LeftOut, counted, no_answers, require_rows, yes_or_no

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
"""Categories of the perception score, at most 2,000."""
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""Categories of the cognition score, at most 800."""
_QUESTIONS = 2  # about each picture
_PREFIX = 4  # characters in which a yes or no may stand


@dataclass(frozen=True)
class MMERow:
    """A question: its category, the picture that it shares with another question, its label and the model's answer."""

    category: str
    picture: str
    label: str
    answer: str | None


@dataclass(frozen=True)
class MMECategory:
    """One category.

    Attributes:
        n: questions.
        accuracy: share of right answers.
        accuracy_plus: share of pictures with both answers right.
    """

    n: int
    accuracy: float
    accuracy_plus: float

    @property
    def value(self) -> float:
        """100 x accuracy + 100 x accuracy plus, at most 200."""
        return 100 * (self.accuracy + self.accuracy_plus)


@dataclass(frozen=True)
class MMEScore:
    """Categories in the benchmark's order, and what is missing in the sums."""

    categories: dict[str, MMECategory]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def n(self) -> int:
        """How many questions."""
        return sum(category.n for category in self.categories.values())

    @property
    def perception(self) -> float:
        """Sum over the categories of perception that are there, at most 2,000: what tables have as MME or MME-P."""
        return self._sum(PERCEPTION)

    @property
    def cognition(self) -> float:
        """Sum over the categories of cognition that are there, at most 800."""
        return self._sum(COGNITION)

    def _sum(self, names: Iterable[str]) -> float:
        return sum((self.categories[name].value for name in names if name in self.categories), 0.0)


def read_answer(answer: str) -> bool | None:
    """Read an answer: true for yes, false for no, None for anything else.

    In lower case without full stops: yes or no, a single y or n, or either word within the first four characters. So
    "Not at all" and "know" are no, and "I think yes" is neither.
    """
    text = answer.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return text == "y"
    beginning = text[:_PREFIX]
    if "yes" in beginning:
        return True
    return False if "no" in beginning else None


def score_mme(task: str, rows: Sequence[MMERow]) -> MMEScore:
    """MME by category, and its two sums.

    Raises:
        DataError: no rows, an unknown category, a label that is neither yes nor no, or a picture without exactly two
            questions; names task, picture and value.
    """
    require_rows(task, rows)
    right: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        if row.category not in PERCEPTION + COGNITION:
            raise DataError(
                f"{task}, picture {row.picture}: unknown category {row.category!r}; the benchmark's are "
                f"{', '.join(PERCEPTION + COGNITION)}"
            )
        label = yes_or_no(task, f"about picture {row.picture} of {row.category}", row.label)
        said = None if row.answer is None else read_answer(row.answer)
        right.setdefault(row.category, {}).setdefault(row.picture, []).append(said is label)
    categories = {
        name: _category(task, name, right[name]) for name in PERCEPTION + COGNITION if name in right
    }
    unread = sum(row.answer is not None and read_answer(row.answer) is None for row in rows)
    notes = (
        *no_answers([row.answer for row in rows]),
        *counted("answers", unread, "neither yes nor no: scored as wrong"),
        *_missing("perception", PERCEPTION, right),
        *_missing("cognition", COGNITION, right),
    )
    return MMEScore(categories, notes)


def _category(task: str, name: str, pictures: dict[str, list[bool]]) -> MMECategory:
    for picture, right in pictures.items():
        if len(right) != _QUESTIONS:
            raise DataError(
                f"{task}, picture {picture} of {name}: has {len(right)} questions instead of {_QUESTIONS}; get the "
                "dataset again"
            )
    questions = [one for right in pictures.values() for one in right]
    return MMECategory(len(questions), fmean(questions), fmean(all(right) for right in pictures.values()))


def _missing(total: str, names: Sequence[str], found: Iterable[str]) -> tuple[LeftOut, ...]:
    absent = sorted(set(names) - set(found), key=names.index)
    return counted(
        "categories", len(absent), f"no questions, so not in the sum of {total}: {', '.join(absent)}"
    )
