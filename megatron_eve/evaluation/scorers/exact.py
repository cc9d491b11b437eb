"""Multiple choice and exact match: ScienceQA, SEED-Bench, GQA, videos; of the text tasks, MMLU and BBH."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_eve.data.errors import DataError
from megatron_eve.data.text.questions import LETTERS
from megatron_eve.evaluation.scorers.scores import (
    Score,
    bad_label,
    counted,
    no_answers,
    require_rows,
)

_SCIENCE_QA_LETTERS = LETTERS[:5]
_THE_ANSWER_IS = re.compile(r"The answer is ([A-Z])\.")
# Greedy up to the last character of the line, which is mostly a full stop, and left out whatever it is.
_BBH_ANSWER = re.compile(r"(?<=the answer is )(.*)(?=.)")


@dataclass(frozen=True)
class ScienceQARow:
    """A question of ScienceQA.

    Attributes:
        id: its id.
        label: index of the right choice.
        choices: how many choices it has, at most five.
        has_picture: whether its prompt has a picture.
        answer: the model's; None if it gave none.
    """

    id: str | int
    label: int
    choices: int
    has_picture: bool
    answer: str | None


@dataclass(frozen=True)
class MatchRow:
    """A question whose answer has to equal a text: its id, the label, the model's answer (None: it gave none)."""

    id: str | int
    label: str
    answer: str | None


def science_qa_choice(answer: str, choices: int) -> int | None:
    """Index of the choice that an answer names; None if it names none of the first `choices`, or several.

    Read are a letter alone (`B`), a letter with full stop and space in front of more (`B. dog`), or one
    `The answer is B.` anywhere; not `b`, `B.`, `(B)` or `B) dog`.

    Source: LLaVA c121f04, llava/eval/eval_science_qa.py.
    """
    if answer[:1] in tuple(_SCIENCE_QA_LETTERS) and (len(answer) == 1 or answer[1:3] == ". "):
        named = [answer[0]]
    else:
        named = _THE_ANSWER_IS.findall(answer)
    allowed = _SCIENCE_QA_LETTERS[:choices]
    return allowed.index(named[0]) if len(named) == 1 and named[0] in allowed else None


def score_science_qa(
    task: str, rows: Sequence[ScienceQARow], questions: Literal["all", "with picture", "without picture"]
) -> Score:
    """Accuracy over all questions, over those with a picture (tables have it as SQA-IMG), or over the others.

    Raises:
        DataError: no such questions, more than five choices, or a label that is not one of them; names task, question
            and value.
    """
    wanted = [row for row in rows if questions == "all" or row.has_picture == (questions == "with picture")]
    require_rows(task, wanted)
    for row in wanted:
        most = min(row.choices, len(_SCIENCE_QA_LETTERS))
        if row.choices > most:
            raise DataError(
                f"{task}, question {row.id}: has {row.choices} choices, and letters reach to {most}"
            )
        if not isinstance(row.label, int) or not 0 <= row.label < most:
            raise bad_label(task, row.id, row.label, f"write the index of one of its {row.choices} choices")
    said = [None if row.answer is None else science_qa_choice(row.answer, row.choices) for row in wanted]
    points = tuple(float(choice == row.label) for choice, row in zip(said, wanted, strict=True))
    answers = [row.answer for row in wanted]
    unread = sum(choice is None and answer is not None for choice, answer in zip(said, answers, strict=True))
    other = "without" if questions == "with picture" else "with"
    return Score(
        points,
        (
            *no_answers(answers),
            *counted("answers", unread, "no choice could be read in them: scored as wrong"),
            *counted("questions", len(rows) - len(wanted), f"{other} a picture: not in this score"),
        ),
    )


def score_seed(task: str, rows: Sequence[MatchRow], first_character: bool = False) -> Score:
    """SEED-Bench: accuracy over questions, an answer being right if it is the letter and nothing else.

    Args:
        task: its name, for messages.
        rows: labels are letters A to D.
        first_character: take the first character of each answer, an option of one published script; its numbers do
            not go into one column with the others.

    Raises:
        DataError: no rows, or a label that is no such letter; names task, question and value.

    Source: LLaVA c121f04, scripts/convert_seed_for_submission.py.
    """
    for row in rows:
        if row.label not in tuple(LETTERS[:4]):
            raise bad_label(task, row.id, row.label, "write one of the letters A to D")
    return _score_matches(task, rows, lambda answer: answer[:1] if first_character else answer)


def score_gqa(task: str, rows: Sequence[MatchRow]) -> Score:
    """GQA: accuracy over the balanced questions. `Yes.` equals `yes`; `yes!` does not, nor `the dog` `dog`.

    Raises:
        DataError: no rows, or a label that is empty or not text; names task, question and value.

    Source: LLaVA c121f04, scripts/convert_gqa_for_eval.py, and GQA's eval.py.
    """
    for row in rows:
        if not isinstance(row.label, str) or not row.label:
            raise bad_label(task, row.id, row.label, "write the answer as text")
    return _score_matches(task, rows, gqa_answer)


def gqa_answer(answer: str) -> str:
    """An answer as GQA compares it: trailing full stops dropped, lower case."""
    return answer.rstrip(".").lower()


def score_word(task: str, rows: Sequence[MatchRow]) -> Score:
    """MSVD-QA and MSRVTT-QA: share of answers that are the label and nothing else, which is one word.

    Case, full stops at the end and spaces around do not count.

    Raises:
        DataError: no rows, or a label that is empty or not text; names task, question and value.

    Source: none in text; both datasets define accuracy as the share of right words.
    """
    for row in rows:
        if not (isinstance(row.label, str) and row.label.strip()):
            raise bad_label(task, row.id, row.label, "write the answer as text")
    plain = [replace(row, label=gqa_answer(row.label.strip())) for row in rows]
    return _score_matches(task, plain, lambda answer: gqa_answer(answer.strip()))


def mmlu_choice(log_likelihoods: Sequence[float]) -> int:
    """Index of the choice with the largest log-likelihood of its letter behind the question; of equal ones the first.

    Args:
        log_likelihoods: of " A", " B", " C", " D" behind "...\\nAnswer:", in this order.

    Source: lm-eval 0.4.13, tasks/mmlu.
    """
    return max(range(len(log_likelihoods)), key=log_likelihoods.__getitem__)


def bbh_answer(text: str) -> str | None:
    """What a chain of thought of BBH answers: the text behind "the answer is " without its last character, or None.

    Case counts: "So the answer is False." gives "False", "The answer is False." nothing.

    Source: lm-eval 0.4.13, tasks/bbh/cot_fewshot.
    """
    found = _BBH_ANSWER.search(text)
    return found.group(1) if found else None


def _score_matches(task: str, rows: Sequence[MatchRow], read: Callable[[str], str]) -> Score:
    require_rows(task, rows)
    points = tuple(float(row.answer is not None and read(row.answer) == row.label) for row in rows)
    return Score(points, no_answers([row.answer for row in rows]))
