"""The scores of a model: a table in Markdown and results.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_eve.evaluation.answers import Answers
from megatron_eve.evaluation.measured import Measured
from megatron_eve.evaluation.requests import Request

MOST_ERRORS = 0.01
"""Share of a task's requests that may lack an answer before its score is in doubt."""


def errors_by_task(requests: Sequence[Request], answers: Answers) -> dict[str, dict[str, int]]:
    """How many answers of each task are errors, by reason."""
    counts: dict[str, dict[str, int]] = {}
    for request in requests:
        answer = answers.found.get(request.key)
        if answer is not None and answer.error is not None:
            reasons = counts.setdefault(request.task, {})
            reason = answer.error.partition(":")[0]
            reasons[reason] = reasons.get(reason, 0) + 1
    return counts


def in_doubt(requests: Sequence[Request], errors: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Tasks of which more than `MOST_ERRORS` of the requests have no answer."""
    asked: dict[str, int] = {}
    for request in requests:
        asked[request.task] = asked.get(request.task, 0) + 1
    return [task for task, reasons in errors.items() if sum(reasons.values()) > MOST_ERRORS * asked[task]]


def markdown(measured: Sequence[Measured], errors: Mapping[str, Mapping[str, int]]) -> str:
    """The values as a table, beside those of other models' papers, with what does not count like the rest below."""
    others = list(dict.fromkeys(name for one in measured for name in one.published))
    rows = [["task", "metric", "value", "standard error", "n", "protocol", *others]]
    for one in measured:
        # The names of judges are whatever their servers call them.
        name, protocol = (" ".join(text.split()).replace("|", "\\|") for text in (one.metric, one.protocol))
        metric = f"**{name}**" if one.main else name
        value = "-" if one.value is None else f"{one.value:,.5g}"
        error = "" if one.standard_error is None else f"{one.standard_error:,.2g}"
        known = [f"{one.published[name]:,}" if name in one.published else "" for name in others]
        rows.append([one.task, metric, value, error, f"{one.n:,}", protocol, *known])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    notes = ["values of other models are those of their papers, not measured here"] if others else []
    notes += [f"{one.task}: {note}" for one in measured if one.main or one.judge for note in one.notes]
    fate = {one.task: one.without_answer for one in measured}
    notes += [
        f"{task}: {sum(reasons.values()):,} requests without an answer, {fate.get(task, 'scored as wrong')} "
        f"({', '.join(f'{reason} {count:,}' for reason, count in sorted(reasons.items()))})"
        for task, reasons in errors.items()
    ]
    return "\n".join([*lines, *([""] if notes else []), *(f"- {note}" for note in notes)])


def write_results(
    path: Path,
    measured: Sequence[Measured],
    errors: Mapping[str, Any],
    answers: Answers,
    versions: Mapping[str, str],
) -> None:
    """Write results.json whole or not at all."""
    head = answers.head
    assert head is not None, "there are answers"
    content = {
        "model": head.model,
        "data": head.data,
        "results": [_entry(one) for one in measured],
        "errors": errors,
        "versions": {"answered": head.versions, "scored": versions},
    }
    _write_json(path, content)


def _entry(one: Measured) -> dict[str, Any]:
    """A value without what has files of its own."""
    entry = asdict(replace(one, graded=(), submission=None, judged=()))
    own = ("graded", "submission", "judged", "judge_rule", "without_answer")
    return {name: value for name, value in entry.items() if name not in own}


def write_submissions(path: Path, measured: Sequence[Measured]) -> list[Path]:
    """Write the files for servers and judges beside results.json: `results.TASK.json` for each such task.

    Args:
        path: of results.json.
        measured: all values; those without a submission are passed over.
    """
    written = []
    for one in measured:
        if one.submission is not None:
            written.append(path.with_name(f"{path.stem}.{one.task}.json"))
            _write_json(written[-1], one.submission)
    return written


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
