"""What a run reports: lines that any JSON reader takes, and a full disk that costs the report and not the run."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_eve.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_eve.data.sampling.loader import Step
from megatron_eve.training.loop.step_result import StepResult
from megatron_eve.training.monitoring.monitor import Monitor

# A thread that ends with an error shows a traceback.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def config_of(folder: Path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(),
        training=TrainingConfig(train_iters=9, eval_interval=3),
        data=DataConfig(mock_data=True),
        checkpoint=CheckpointConfig(save=str(folder / "run")),
        logging=LoggingConfig(tensorboard_dir=str(folder / "board")),
    )


def report(monitor: Monitor, iteration: int, loss: float = 2.5, **others: float) -> None:
    step = Step(
        batches=(),
        num_microbatches=0,
        num_packs=0,
        sample_ids=np.arange(4),
        num_tokens=9,
        num_labels=8,
        num_images=0,
        capacity_fraction=0.5,
    )
    losses = {"lm loss": loss, **others}
    result = StepResult(losses, math.inf)
    monitor.report(iteration, 4 * iteration, step, result, learning_rate=0.1, flops=1.0)
    monitor.write(data_wait=0.25, peak_memory=3 << 29)
    monitor.report_held_out(iteration, "a", losses)


def strict_lines(path: Path) -> list[dict[str, Any]]:
    """Of a file of lines; Python's own reader would take NaN, which is not JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_what_is_not_a_number_is_null(tmp_path: Path) -> None:
    monitor = Monitor(config_of(tmp_path), active=True, start=0)
    report(monitor, 1, math.nan)
    monitor.close()
    (line,) = strict_lines(tmp_path / "run" / "losses.jsonl")
    assert (line["lm_loss"], line["lm_loss_hex"], line["grad_norm"]) == (None, "nan", None)
    assert strict_lines(tmp_path / "run" / "valid_losses.jsonl")[0]["lm_loss"] is None


def test_losses_are_reported_by_the_names_of_their_objectives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = Monitor(config_of(tmp_path), active=True, start=0)
    report(monitor, 1, 2.5, **{"mean colour": 0.25})
    monitor.close()
    printed = capsys.readouterr().out
    assert " | lm loss: 2.500000E+00 | mean colour: 2.500000E-01 | grad norm: inf | ETA: " in printed
    assert (
        "lm loss value: 2.500000E+00 | mean colour value: 2.500000E-01 | lm loss PPL: 1.218249E+01 |"
        in printed
    )
    (line,) = strict_lines(tmp_path / "run" / "losses.jsonl")
    assert (line["mean_colour"], line["mean_colour_hex"]) == (0.25, (0.25).hex())
    assert (line["data_wait_seconds"], line["peak_memory_bytes"]) == (0.25, 3 << 29)
    assert strict_lines(tmp_path / "run" / "valid_losses.jsonl")[0]["mean_colour"] == 0.25


def test_a_full_disk_costs_reports_and_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some of a line is written when the disk is full; with room again, whole lines follow."""
    monitor = Monitor(config_of(tmp_path), active=True, start=0)
    report(monitor, 1)
    losses = tmp_path / "run" / "losses.jsonl"
    with full_disk(losses.stat().st_size + 10):
        for iteration in (2, 3):
            report(monitor, iteration)
    report(monitor, 4)
    monitor.close()
    lines = [line["iteration"] for line in strict_lines(losses)]
    assert lines[0] == 1 and lines[-1] == 4 and 3 not in lines
    assert capsys.readouterr().out.count("losses.jsonl could not be written (File too large)") >= 1


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {
        name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]
    }


def test_a_full_disk_costs_the_curves_of_tensorboard_from_then_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said once, without a traceback; what was written before stays, and no file is left open."""
    board = tmp_path / "board"
    monitor = Monitor(config_of(tmp_path), active=True, start=0)
    report(monitor, 1)
    (events,) = board.iterdir()
    with full_disk(events.stat().st_size + 10):
        for iteration in (2, 3):
            report(monitor, iteration)
    report(monitor, 4)
    monitor.close()
    assert [step for step, _ in curves(board)["lm_loss"]] == [1]
    out, err = capsys.readouterr()
    assert out.count(f"{board} could not be written (File too large); the run goes on") == 1
    assert "Traceback" not in out + err


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    for start, loss in ((0, 2.5), (2, 1.5)):
        monitor = Monitor(config_of(tmp_path), active=True, start=start)
        for iteration in range(start + 1, start + 4):
            report(monitor, iteration, loss)
        monitor.close()
    shown = curves(tmp_path / "board")
    assert shown["lm_loss"] == [(1, 2.5), (2, 2.5), (3, 1.5), (4, 1.5), (5, 1.5)]
    assert shown["lm_loss validation/a"] == shown["lm_loss"]
    assert {"lr", "grad_norm", "pack_fill", "tflops_per_gpu", "tokens_per_second"} < set(shown)
    assert [value for _, value in shown["data_wait_seconds"]] == [0.25] * 5
    assert shown["peak_memory_gib"][0] == (1, 1.5) and shown["step_seconds"][0][1] > 0


@pytest.mark.parametrize("there", [True, False], ids=["nothing can be written", "the folder cannot be made"])
def test_reports_that_cannot_even_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], there: bool
) -> None:
    if there:
        (tmp_path / "run").mkdir()
        (tmp_path / "board").mkdir()
    else:
        for name in ("run", "board"):
            (tmp_path / name).write_text("a file")
    with full_disk(0):
        monitor = Monitor(config_of(tmp_path), active=True, start=0)
        for iteration in (1, 2):
            report(monitor, iteration)
        monitor.close()
    printed = [line for line in capsys.readouterr().out.splitlines() if "could not be written" in line]
    assert len(printed) == len(set(printed)) == 3
    assert all("the run goes on" in line for line in printed)
