"""Scores over a run's iterations: evaluation.jsonl and TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.answers import Head
from megatron_eve.evaluation.measured import Measured
from megatron_eve.evaluation.training_record import add_scalars, append_scores, check_iteration


def head(iteration: int | None) -> Head:
    return Head({"iteration": iteration, "model_path": "run"}, {}, {})


def measured(value: float) -> list[Measured]:
    return [
        Measured("pope", "accuracy", value, 0.1, 10, "lmms-eval", True),
        Measured("mme", "score", None, None, 10, "lmms-eval", True),
    ]


def test_each_score_is_a_line_also_behind_one_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "run" / "evaluation.jsonl"
    append_scores(path, head(5), measured(0.5))
    append_scores(path, head(10), measured(0.75))
    with path.open("a") as stream:
        stream.write('{"iteration": 1')
    append_scores(path, head(15), measured(1.0))
    lines = path.read_text().splitlines()
    assert lines.pop(2) == '{"iteration": 1'
    rows = [json.loads(line) for line in lines]
    assert [row["iteration"] for row in rows] == [5, 10, 15]
    assert [row["scores"] for row in rows] == [
        {"pope": {"accuracy": value}, "mme": {"score": None}} for value in (0.5, 0.75, 1.0)
    ]


def test_scalars_stay_when_an_older_iteration_is_scored_later(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    add_scalars(str(tmp_path), head(10), measured(0.75))
    add_scalars(str(tmp_path), head(5), measured(0.5))
    found = EventAccumulator(str(tmp_path)).Reload()
    assert found.Tags()["scalars"] == ["pope/accuracy"]
    assert {event.step: event.value for event in found.Scalars("pope/accuracy")} == {10: 0.75, 5: 0.5}


def test_answers_of_no_checkpoint_are_refused(tmp_path: Path) -> None:
    check_iteration(head(5), tmp_path)
    with pytest.raises(DataError, match="run is no checkpoint of a run and has no iteration; leave --eval"):
        check_iteration(head(None), tmp_path)
