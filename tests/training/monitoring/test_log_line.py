"""The log line's means, epochs and remaining time, and the rows of the summary."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.config import CheckpointConfig, DataConfig, RunConfig, TrainingConfig
from megatron_eve.training.monitoring.log_line import LogLine, duration
from megatron_eve.training.monitoring.summary import RunEnd, RunTotals, format_run_summary

NOW = datetime(2026, 11, 28, 16, 20)


def record(iteration: int, seconds: float, **others: Any) -> dict[str, Any]:
    return {
        "iteration": iteration, "consumed_samples": 8 * iteration, "samples": 8, "tokens": 100, "seconds": seconds,
        "data_wait_seconds": 0.001 * iteration, "peak_memory_bytes": 3 << 29, "tflops_per_gpu": 1.0 / seconds,
        "lr": 4e-5, "grad_norm": 0.5, "skipped": False, **others,
    }  # fmt: skip


def test_a_line_has_the_means_of_the_steps_since_the_last_one() -> None:
    line = LogLine(iterations=2000, samples=16000, epoch_samples=64, gpu=True)
    line.add(record(1, 9.0))
    line.text({"lm loss": 3.0}, NOW)
    line.add(record(2, 1.0))
    line.add(record(3, 3.0))
    assert line.text({"lm loss": 2.5}, NOW) == (
        "[2026-11-28 16:20:00] iteration    3/2000 | consumed samples:    24 | epoch: 0.38 | "
        "elapsed time per iteration (ms): 2000.0 | data wait (ms): 2.5 | throughput per GPU (TFLOP/s/GPU): 0.5 | "
        "tokens/s: 50 | peak GPU memory (GiB): 1.50 | learning rate: 4.000E-05 | lm loss: 2.500000E+00 | "
        "grad norm: 0.500 | ETA: 1:07 |"  # 1997 steps of two seconds; the first one does not count
    )


def test_a_line_without_an_epoch_and_with_a_skipped_update() -> None:
    line = LogLine(iterations=2, samples=16, epoch_samples=None, gpu=False)
    line.add(record(1, 1.0, skipped=True))
    text = line.text({"lm loss": 3.0, "mean colour": 0.1}, NOW)
    assert "epoch" not in text
    assert "| peak RSS (GiB): 1.50 |" in text
    assert "| mean colour: 1.000000E-01 | grad norm: 0.500 | update skipped | ETA: 0:01 |" in text


def test_codes_that_are_predicted_are_counted() -> None:
    line = LogLine(iterations=3, samples=24, epoch_samples=None, gpu=False)
    line.add(record(1, 1.0, codes=0))
    line.add(record(2, 3.0, codes=512))
    assert "| tokens/s: 50 | codes/s: 128 | peak RSS" in line.text({"lm loss": 3.0}, NOW)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (1, "0:01"), (3600, "1:00"), (86399, "1d 00:00"), (93900, "1d 02:05"), (86340, "23:59")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def rows_of(config: RunConfig, end: RunEnd) -> dict[str, str]:
    totals = RunTotals()
    for iteration, seconds in enumerate((9.0, 1.0, 3.0), 1):
        totals.add(record(iteration, seconds, skipped=iteration == 2), {"lm loss": 4.0 - iteration})
    pairs = (
        re.split("  +", line, maxsplit=1) for line in format_run_summary(config, totals, end).splitlines()
    )
    return {name: text for name, text in pairs}


def config_of(save: str | None, load: str | None = None, **training: Any) -> RunConfig:
    return RunConfig(
        training=TrainingConfig(train_iters=4, global_batch_size=8, **training),
        data=DataConfig(data_path=("set",), tokenizer_model="t.model"),
        checkpoint=CheckpointConfig(save=save, load=load),
    )


def test_the_summary_of_a_run_that_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    save = str(tmp_path)
    end = RunEnd("Ctrl-C (SIGINT)", 0, 3, 24, saved=3, left_out=2, placeholders=1, seconds=3661.4)
    rows = rows_of(config_of(save), end)
    assert rows == {
        "run ended": "Ctrl-C (SIGINT)",
        "iterations": "3 done, 3 of 4",
        "samples": "24 (24 of 32)",
        "tokens": "300",
        "wall time": "1:01:01 from the first step to the end",
        "step time": "2000.0 ms on average (50 tokens/s), without the first step's 9000.0 ms",
        "lm loss": "3.000000 at first, 1.000000 at last",
        "left out": "2 samples that no pack can hold, 1 damaged images replaced by placeholder images, "
        "1 updates of bad steps",
        "saved": f"{save}, iteration 3",
        "next": f"the same command with --load {save} goes on from iteration 3",
    }
    assert rows_of(config_of(save, load=save), end)["next"] == "the same command goes on from iteration 3"
    nothing = rows_of(config_of(None), RunEnd("SIGUSR1", 0, 3, 24, None, 0, 0))
    assert nothing["saved"] == "nothing: no --save was given" and "next" not in nothing


def test_the_summary_has_figures_by_depth_and_the_last_evaluation() -> None:
    totals = RunTotals()
    totals.add(
        record(1, 1.0),
        {"commitment loss": 2.0},
        {"codes in use 1": 30.0, "codes in use 2": 31.0, "adaptive weight": 4.0 / 3},
    )
    totals.held_out["pairs"] = {"PSNR": 15.5, "top-1 texts of pictures": 0.25}
    lines = format_run_summary(config_of(None), totals, RunEnd(None, 0, 1, 8, None, 0, 0)).splitlines()
    rows = dict(re.split("  +", line, maxsplit=1) for line in lines)
    assert rows["codes in use"] == "30, 31 at last" and rows["adaptive weight"] == "1.333 at last"
    assert rows["held out, pairs"] == "PSNR 15.5, top-1 texts of pictures 0.25"


def test_the_summary_of_a_complete_run_names_the_next_command() -> None:
    end = RunEnd(None, 1, 4, 32, saved=4, left_out=0, placeholders=0)
    rows = rows_of(config_of("runs/a", load="runs/a"), end)
    assert rows["run ended"] == "all iterations are done"
    assert rows["iterations"].startswith("3 done, 4 of 4, resumed from runs/a at iteration 1")
    assert rows["next stage"].startswith(
        "python -m megatron_eve.pretrain --stage 3 --pretrained-checkpoint runs/a "
    )
    last = rows_of(config_of("runs/a", stage=3), end)
    assert "next stage" not in last
    assert (
        last["try it"] == "python tools/chat.py --model-path runs/a --tokenizer-model t.model --image PHOTO"
    )
