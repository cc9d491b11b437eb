"""VQA accuracy: VQAv2, VizWiz, TextVQA and OK-VQA, where ten people answered each question.

Each person in turn is left out, and the answer gets min(1, n / 3) for the n others who said it; the mean over the ten
is the accuracy. So with k people who said it: 0, 0.3, 0.6, 0.9, and 1 from four on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.scorers.answer_processor import one_line, process_answer, process_as_vqa_tool
from megatron_eve.evaluation.scorers.scores import Score, bad_label, no_answers, require_rows

PEOPLE = 10
"""How many people answered each question."""
_FULL = 3  # so many others who said it make an answer wholly right

VQARule = Literal["processed", "converted", "vqa_tool"]
"""How answers are compared. `processed`: the model's and the people's through the answer processor (TextVQA as LLaVA
scores it; lmms-eval's VizWiz). `vqa_tool`: by the VQA tool, which processes both only if the ten differ as they stand:
against ten times "yes", "Yes" is wrong. `converted`: the model's through the answer processor first, then by the tool
(what is submitted to VQAv2's server)."""


@dataclass(frozen=True)
class VQARow:
    """A question: its id, the model's answer (None: it gave none), and the answers of ten people."""

    id: str | int
    answer: str | None
    people: Sequence[str]


def vqa_accuracy(answer: str, people: Sequence[str], rule: VQARule = "processed") -> float:
    """Accuracy of one answer, 0 to 1.

    Args:
        answer: the model's, as it wrote it.
        people: answers of ten people, as in the dataset.
        rule: how both are compared.

    Raises:
        ValueError: there are not ten.

    Source: VQA, Antol et al. 2015, section 5, with the leaving-out of GT-Vision-Lab/VQA a013f00, vqaEval.py.
    """
    if len(people) != PEOPLE:
        raise ValueError(f"{len(people)} answers of people instead of {PEOPLE}")
    if rule != "vqa_tool":
        answer = process_answer(answer)
    if rule == "processed":
        people = [process_answer(person) for person in people]
    else:
        answer, people = one_line(answer), [one_line(person) for person in people]
        if len(set(people)) > 1:
            answer, people = process_as_vqa_tool(answer), [process_as_vqa_tool(person) for person in people]
    same = [person == answer for person in people]
    count = sum(same)
    return fmean(min(1.0, (count - this) / _FULL) for this in same)


def score_vqa(task: str, rows: Sequence[VQARow], rule: VQARule) -> Score:
    """Mean VQA accuracy over questions.

    Raises:
        DataError: no rows, or a question without ten answers of people; names task, question and value.
    """
    require_rows(task, rows)
    points = []
    for row in rows:
        _check_people(task, row)
        points.append(0.0 if row.answer is None else vqa_accuracy(row.answer, row.people, rule))
    return Score(tuple(points), no_answers([row.answer for row in rows]))


def _check_people(task: str, row: VQARow) -> None:
    if isinstance(row.people, str) or not all(isinstance(person, str) for person in row.people):
        raise bad_label(task, row.id, row.people, f"give the texts of {PEOPLE} people's answers")
    if len(row.people) != PEOPLE:
        raise DataError(
            f"{task}, question {row.id}: has {len(row.people)} answers of people instead of {PEOPLE}; get the dataset "
            "again"
        )
