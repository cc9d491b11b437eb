"""A run of a tower that is killed (SIGKILL) where it may be, and goes on: the losses are those of one that was not."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.models.vila_u.pairs import caption, write_pairs, write_siglip
from tests.training.killed_runs import Run, lines_of, resumes_at

ITERATIONS = 12


def start(words: list[str], save: Path, number: int) -> Run:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "megatron_eve.train_tower", *words, "--save", str(save), "--load", str(save)]
    return Run([sys.executable, *launcher, *command], save, f"{save}:{number}")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    siglip = write_siglip(tmp_path / "siglip")
    pairs = write_pairs(tmp_path, siglip / "tokenizer.json", [caption(number) for number in range(24)])
    words = [
        "--preset", "vila_u_tower_tiny", "--data-path", pairs, "--vision-tower", str(siglip), "--seed", "3",
        "--perceptual-weights", "random", "--global-batch-size", "5", "--train-iters", str(ITERATIONS),
        "--visual-codebook-size", "32", "--lr", "1e-3", "--gan-start", "4", "--save-interval", "3",
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(words, whole, 0).torchrun.wait(timeout=240) == 0
    for number, iteration in enumerate((5, 8), start=1):  # behind a checkpoint, not at one
        run, deadline = start(words, killed, number), time.monotonic() + 240
        while not any(line["iteration"] >= iteration for line in lines_of(killed)):
            assert time.monotonic() < deadline and run.torchrun.poll() is None, run.output()
            time.sleep(0.02)
        assert run.kill() > 2
        assert 0 < resumes_at(killed) < ITERATIONS
    assert start(words, killed, 3).torchrun.wait(timeout=240) == 0

    def of(save: Path) -> dict[int, dict[str, object]]:
        """What each iteration reports but times and memory; of one that was done twice, the last."""
        timed = ("seconds", "data_wait_seconds", "peak_memory_bytes", "tflops_per_gpu")
        return {
            line["iteration"]: {k: v for k, v in line.items() if k not in timed} for line in lines_of(save)
        }

    assert of(killed) == of(whole) and len(of(whole)) == ITERATIONS
    assert "discriminator_loss_hex" in of(whole)[ITERATIONS]
