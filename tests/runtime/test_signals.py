"""A run that is asked to leave saves first; one that hangs says where and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_eve.config import TRACKER
from megatron_eve.runtime.signals import Watchdog

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.distributed


@contextlib.contextmanager
def started(save: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Two ranks on mock data, without an end in sight; whatever becomes of the test, they do not outlive it."""
    process = subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "megatron_eve.pretrain", "--preset", "eve_mini", "--mock-data", "--global-batch-size", "4",
            "--seq-length", "512", "--train-iters", "100000", "--save", str(save), "--load", str(save), *words,
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                one.kill()
        process.wait()


@pytest.mark.parametrize(
    ("number", "of_ranks", "words"),
    [
        (signal.SIGUSR1, [0, 1], ["--tensor-model-parallel-size", "2"]),
        # One rank hears it, both leave.
        pytest.param(signal.SIGTERM, [1], ["--async-save", "--save-interval", "1"], marks=pytest.mark.slow),
    ],
)
def test_a_signal_makes_a_checkpoint(
    tmp_path: Path, number: signal.Signals, of_ranks: list[int], words: list[str]
) -> None:
    losses = tmp_path / "losses.jsonl"
    with started(tmp_path, *words) as process:
        while process.poll() is None and not (losses.exists() and losses.read_text().count("\n") > 2):
            time.sleep(0.05)
        ranks = sorted(
            psutil.Process(process.pid).children(), key=lambda child: int(child.environ().get("RANK", "-1"))
        )
        assert len(ranks) == 2
        for rank in of_ranks:
            ranks[rank].send_signal(number)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    iteration = losses.read_text().count("\n")
    assert f"exiting at iteration {iteration} ({number.name})" in output
    assert f"saved checkpoint at iteration {iteration} to " in output
    assert (tmp_path / TRACKER).read_text() == str(iteration)


def catches(process: psutil.Process, number: signal.Signals) -> bool:
    """Has a process put a handler behind a signal?"""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_a_signal_while_a_run_is_still_starting(tmp_path: Path) -> None:
    """Sent as soon as a rank hears it, long before torch is imported: the run leaves before its first step."""
    ranks: list[psutil.Process] = []
    with started(tmp_path) as process:
        while process.poll() is None and len(ranks) < 2:
            time.sleep(0.01)
            with contextlib.suppress(psutil.Error, OSError):  # a child of torchrun that ended meanwhile
                children = psutil.Process(process.pid).children()
                ranks = [child for child in children if catches(child, signal.SIGUSR1)]
        assert not (tmp_path / "losses.jsonl").exists()
        ranks[0].send_signal(signal.SIGUSR1)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    assert "exiting at iteration 0 (SIGUSR1)" in output
    assert not (tmp_path / TRACKER).exists()
    assert not (tmp_path / "losses.jsonl").read_text()


HANGS = """
import threading, time
from megatron_eve.runtime.signals import Watchdog

def waits_for_ever():
    time.sleep(100)

dog = Watchdog(1.0)
for _ in range(4):
    time.sleep(0.5)
    dog.feed()
with dog.paused():
    time.sleep(1.5)
print("fed", flush=True)
waits_for_ever()
"""


def test_the_watchdog_shows_where_a_rank_hangs() -> None:
    """It lets alone what is fed or paused; then it prints every thread's stack and ends the process."""
    begun = time.monotonic()
    found = subprocess.run(
        [sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=90, check=False,
        env={**os.environ, "RANK": "3"},
    )  # fmt: skip
    assert found.returncode == 1
    assert found.stdout == "fed\n"
    assert "rank 3: no step has ended for 1 s" in found.stderr
    assert "in waits_for_ever" in found.stderr
    assert time.monotonic() - begun < 80


def test_a_watchdog_that_is_closed_is_quiet() -> None:
    dog = Watchdog(0.2)
    dog.close()
    time.sleep(0.5)  # it would end this process
