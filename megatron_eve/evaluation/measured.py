"""A measured value of a task, whichever harness worked it out."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_eve.evaluation.requests import Request, rows_of
from megatron_eve.evaluation.scorers.judged import JudgeRow
from megatron_eve.evaluation.scorers.scores import Reported, Submission


@dataclass(frozen=True)
class Measured:
    """One value of a task.

    Attributes:
        task: its name.
        metric: the name of the value.
        value: on the scale of the task; None where it could not be worked out.
        standard_error: of the value, on its scale; None where the harness gives none.
        n: documents that it is of.
        protocol: whose prompts and scoring: "lmms-eval" and "lm-eval" for stock tasks, else as the task file has it.
        main: it stands for the task in a table of many tasks.
        notes: what does not count like the rest, for a footnote.
        published: the same value of other models, by name, as their papers have it.
        graded: of the main value of a task, for each document: 0 (wrong) to 1, and the label. Of a stock task if it was
            asked for, and if its harness has such a number.
        submission: the content of a server's or a judge's file, which stands in the place of a value.
        judged: of the main value, the answers of all documents for a judge; none where no judge is asked.
        judge_rule: how it is asked (`scorers.judged.RULES`).
        judge: the name of the judge whose value this is; empty for values that were worked out here.
        without_answer: what becomes of a request without an answer, for a footnote.
    """

    task: str
    metric: str
    value: float | None
    standard_error: float | None
    n: int
    protocol: str
    main: bool
    notes: tuple[str, ...] = ()
    published: Mapping[str, float] = field(default_factory=dict)
    graded: Sequence[tuple[float, Mapping[str, Any]]] = field(default=(), repr=False)
    submission: list[dict[str, Any]] | dict[str, str] | None = None
    judged: Sequence[JudgeRow] = field(default=(), repr=False)
    judge_rule: str = ""
    judge: str = ""
    without_answer: str = "scored as wrong"


def stock_values(
    task: str, results: Mapping[str, Any], n: int, protocol: str, main: str | None = None
) -> Iterable[Measured]:
    """The values of a task in a harness's results, whose keys are "metric,filter" and "metric_stderr,filter".

    Args:
        task: its name.
        results: of this task.
        n: documents.
        protocol: whose.
        main: the metric that stands for the task; else the first.
    """
    names = [name for name in results if "," in name and "_stderr" not in name.partition(",")[0]]
    names = [name for name in names if _number(results[name]) is not None]
    chosen = next((name for name in names if name.partition(",")[0] == main), names[0] if names else None)
    for name in names:
        metric, _, filtered = name.partition(",")
        shown = metric if filtered == "none" else f"{metric} ({filtered})"
        error = _number(results.get(f"{metric}_stderr,{filtered}"))
        yield Measured(task, shown, _number(results[name]), error, n, protocol, name == chosen)


def with_grades(
    values: Iterable[Measured],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    requests: Sequence[Request],
    lower_is_better: Collection[str] = (),
) -> list[Measured]:
    """The values of a stock task, the main one with the points of each document.

    They are taken where the harness has a plain number of 0 to 1 for each document.

    Args:
        values: of the task.
        samples: the harness's, by the split of the requests.
        requests: of the task.
        lower_is_better: metrics that have no such points.
    """
    of_row = {
        (split, sample["doc_id"]): sample for split, some in samples.items() for sample in reversed(some)
    }
    found = []
    for one in values:
        metric = one.metric.partition(" (")[0]
        if one.main and metric not in lower_is_better:
            grades = [
                _sample_grade(of_row.get((row[0].split, row[0].doc_id), {}), metric)
                for row in rows_of(requests)
            ]
            known = [grade for grade in grades if grade is not None]
            one = replace(one, graded=known if len(known) == len(grades) else ())
        found.append(one)
    return found


def _sample_grade(sample: Mapping[str, Any], metric: str) -> tuple[float, Mapping[str, Any]] | None:
    points = sample.get(metric)
    if not isinstance(points, float | int) or not 0 <= points <= 1:
        return None
    return float(points), {"label": sample.get("target")}


def own_values(
    task: str,
    results: Mapping[str, Any],
    protocol: str,
    main: str | None,
    published: Mapping[str, float] | None = None,
    judge_rule: str = "",
) -> Iterable[Measured]:
    """The values of a task of this project, whose results are `Reported` and `Submission`, as `stock_values`.

    Args:
        task: its name.
        results: of this task.
        protocol: whose.
        main: the metric that stands for the task.
        published: the main metric of other models.
        judge_rule: how a judge is asked about the answers, if it is.
    """
    for name, found in results.items():
        metric, _, _ = name.partition(",")
        if not isinstance(found, (Reported, Submission)):
            continue
        notes = tuple(f"{note.count:,} {note.what}: {note.why}" for note in found.left_out)
        shown = (
            (found.value, found.standard_error, found.n)
            if isinstance(found, Reported)
            else (None, None, len(found.rows) - found.not_asked)
        )
        rows = found.rows if isinstance(found, Submission) else None
        known = published or {} if metric == main else {}
        graded = _graded(found) if metric == main and isinstance(found, Reported) else ()
        judged = (found.judged, judge_rule) if metric == main and judge_rule else ()
        yield Measured(task, metric, *shown, protocol, metric == main, notes, known, graded, rows, *judged)


def _graded(found: Reported) -> list[tuple[float, Mapping[str, Any]]]:
    """Points and label of each row: all of its fields but the answer."""
    labels = [{name: value for name, value in vars(row).items() if name != "answer"} for row in found.rows]
    return list(zip(found.points, labels, strict=True))


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
