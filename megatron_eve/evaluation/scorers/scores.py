"""What scorers return, and the checks of labels that they share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from megatron_eve.data.errors import DataError


@dataclass(frozen=True)
class LeftOut:
    """Something that is not in a score, or not as the rest of it is, for the footnote of a table.

    Attributes:
        what: "answers", "questions", "categories" or the name of a value.
        count: how many.
        why: the reason, and what was done with them.
    """

    what: str
    count: int
    why: str


@dataclass(frozen=True)
class Score:
    """A mean over questions.

    Attributes:
        points: of each question, in the order of the rows; 0 to 1.
        left_out: what does not count like the rest; none if all does.
    """

    points: tuple[float, ...]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def n(self) -> int:
        """How many questions the score is of."""
        return len(self.points)

    @property
    def value(self) -> float:
        """The mean, 0 to 1; tables print it times 100."""
        return fmean(self.points)


@dataclass(frozen=True)
class Reported:
    """A value as a table prints it.

    Attributes:
        value: in percent, or in the points of the benchmark; None where it could not be worked out, as `left_out` says.
        standard_error: of a mean over questions, s / sqrt(n), on the scale of the value; None for other values.
        n: questions that it is of.
        left_out: what does not count like the rest; with the main value of a task, for the whole task.
        rows: with the main value of a task, all of its rows, in the order of the documents.
        points: of these rows, 0 (wrong) to 1.
        judged: with the main value of a task whose answers a judge can grade, all of them (`judged.JudgeRow`).
    """

    value: float | None
    standard_error: float | None
    n: int
    left_out: tuple[LeftOut, ...] = ()
    rows: tuple[Any, ...] = ()
    points: tuple[float, ...] = ()
    judged: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Submission:
    """Answers in the layout of a benchmark's server, as the content of a JSON file: there is no score here.

    Attributes:
        rows: an object for each question; of MM-Vet one object for all of them, answer by question.
        left_out: questions without an answer, which stand there with an empty one.
        not_asked: how many of the rows are of questions that the task does not ask.
        judged: as of `Reported`.
    """

    rows: list[dict[str, Any]] | dict[str, str]
    left_out: tuple[LeftOut, ...] = ()
    not_asked: int = 0
    judged: tuple[Any, ...] = ()


def in_percent(score: Score, rows: Sequence[object] = ()) -> Reported:
    """A mean over questions in percent, with its standard error where there are two and more.

    Args:
        score: it.
        rows: what it is of, if each row is a question of its own.
    """
    reported = mean_in_percent(score.points, score.left_out)
    return replace(reported, rows=tuple(rows), points=score.points if rows else ())


def mean_in_percent(points: Sequence[float], left_out: tuple[LeftOut, ...] = ()) -> Reported:
    """The mean of points, 0 to 1, as `in_percent`."""
    n = len(points)
    error = 100 * stdev(points) / sqrt(n) if n > 1 else None
    return Reported(100 * fmean(points), error, n, left_out)


def no_answers(answers: Sequence[str | None]) -> tuple[LeftOut, ...]:
    """The note about questions without an answer; nothing if each has one."""
    return counted(
        "answers", sum(answer is None for answer in answers), "the model gave none: scored as wrong"
    )


def counted(what: str, count: int, why: str) -> tuple[LeftOut, ...]:
    """A note, or nothing if there is nothing to count."""
    return (LeftOut(what, count, why),) if count else ()


def require_rows(task: str, rows: Sequence[object]) -> None:
    """Refuse an empty task, whose score would be a division by zero.

    Raises:
        DataError: no rows.
    """
    if not rows:
        raise DataError(f"{task}: there are no questions to score; check its split and its folder")


def yes_or_no(task: str, row: object, label: object) -> bool:
    """A label as true for yes. Case, spaces around it and full stops do not count, as in lmms-eval.

    Raises:
        DataError: it is neither yes nor no.
    """
    text = label.lower().strip().replace(".", "") if isinstance(label, str) else None
    if text not in ("yes", "no"):
        raise bad_label(task, row, label, "write yes or no")
    return text == "yes"


def bad_label(task: str, row: object, label: object, remedy: str) -> DataError:
    """The error for a label that a scorer cannot take: task, row and value in one sentence."""
    shown = re.sub(r"\s+", " ", repr(label))
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return DataError(f"{task}, question {row}: the label is {shown}; {remedy}, or get the dataset again")


class NoAnswer(str):
    """What a task gets in the place of an answer that does not exist; it reads as an empty text."""

    def __new__(cls) -> NoAnswer:
        """The empty text."""
        return super().__new__(cls, "")

    def strip(self, chars: str | None = None, /) -> NoAnswer:
        """Itself: lmms-eval strips each answer before a task gets it, and would make an empty answer of it."""
        return self


def answer_of(results: Sequence[str]) -> str | None:
    """The answer to a question, as lmms-eval hands it to a task; None if there is none."""
    return None if isinstance(results[0], NoAnswer) else results[0]
