"""Scores of a run's checkpoints over its iterations: `SAVE/evaluation.jsonl`, and scalars of TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.answers import Head
from megatron_eve.evaluation.measured import Measured
from megatron_eve.training.monitoring.output_files import TensorBoardWriter, json_line


def check_iteration(head: Head, answers: Path) -> None:
    """Refuse answers of a model that has no iteration.

    Raises:
        DataError: they are not of a checkpoint.
    """
    if head.model["iteration"] is None:
        raise DataError(
            f"--answers {answers}: {head.model['model_path']} is no checkpoint of a run and has no iteration; leave "
            "--evaluation-log and --tensorboard-dir out"
        )


def append_scores(path: Path, head: Head, measured: Sequence[Measured]) -> None:
    """Append a line of JSON: iteration, model_path, time and scores by task and metric.

    An iteration that is scored again has a second line; the last one counts. A line that was cut off by a full disk
    stays as it is, and the new one begins below it.

    Raises:
        OSError: the file cannot be written.
    """
    scores: dict[str, dict[str, float | None]] = {}
    for one in measured:
        scores.setdefault(one.task, {})[one.metric] = one.value
    record = {
        "iteration": head.model["iteration"],
        "model_path": head.model["model_path"],
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "scores": scores,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as stream:
        torn = False
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            torn = stream.read(1) != b"\n"
        # One write, as another job may append at the same time.
        stream.write((("\n" if torn else "") + json_line(record)).encode())
        stream.flush()
        os.fsync(stream.fileno())


def add_scalars(folder: str, head: Head, measured: Sequence[Measured]) -> None:
    """Write an event file with a scalar TASK/METRIC for each value, at the checkpoint's iteration."""
    values = {f"{one.task}/{one.metric}": one.value for one in measured if one.value is not None}
    writer = TensorBoardWriter(folder, None)
    writer.add(values, head.model["iteration"])
    writer.close()
