"""Zero-shot classification: is the label the first class of an answer, and one of its first five?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_eve.evaluation.scorers.scores import Score, require_rows


@dataclass(frozen=True)
class ClassRow:
    """A picture.

    Attributes:
        id: of the row.
        answer: numbers of the most likely classes, the first one first; None without an answer, which is wrong.
        label: number of its class.
        name: of that class.
    """

    id: int
    answer: Sequence[int] | None
    label: int
    name: str


def score_classes(task: str, rows: Sequence[ClassRow]) -> tuple[Score, Score]:
    """Top-1 and top-5 accuracy.

    Raises:
        DataError: no rows.
    """
    require_rows(task, rows)
    first = tuple(float(row.label in (row.answer or ())[:1]) for row in rows)
    best_five = tuple(float(row.label in (row.answer or ())[:5]) for row in rows)
    return Score(first), Score(best_five)
