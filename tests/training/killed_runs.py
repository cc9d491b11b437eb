"""Runs that are started in order to be killed, for test_kill.py and benchmarks/random_kills.py."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from megatron_eve.config import TRACKER
from tests.data.helpers import write_dataset

ROOT = Path(__file__).parents[2]
# In the environment of everything that a run starts, also of what has lost its parent.
_MARK = "MEGATRON_EVE_KILLED_RUN"


class Run:
    """A run that was started: torchrun, its ranks, and what those start.

    Args:
        words: the command.
        save: folder of the run; its output is added to SAVE.log.
        mark: unlike that of any other run.
    """

    def __init__(self, words: Sequence[str], save: Path, mark: str) -> None:
        self._mark, self._log = mark, save.with_name(f"{save.name}.log")
        with self._log.open("ab") as stream:
            self._offset = stream.tell()
            self.torchrun = psutil.Popen(
                words,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", _MARK: mark},
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def everything(self) -> list[psutil.Process]:
        """All processes of the run that are alive, those that have lost their parent too."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """The ranks that are alive: torchrun starts each in a session of its own."""
        found = []
        for process in self.everything():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == process.pid != self.torchrun.pid:
                    found.append((process.environ()["RANK"], process))
        return [process for _, process in sorted(found, key=lambda pair: int(pair[0]))]

    def kill(self) -> int:
        """SIGKILL to all of it; gives how many processes there were."""
        killed = set()
        while family := self.everything():  # again, for what was forked meanwhile
            for process in family:
                killed.add(process.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=10)
        self.torchrun.wait()
        return len(killed)

    def outlives(self, seconds: float) -> list[psutil.Process]:
        """What is still alive after so many seconds; returns as soon as nothing is."""
        deadline = time.monotonic() + seconds
        while (left := self.everything()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def output(self) -> str:
        """What the run has printed."""
        return self._log.read_bytes()[self._offset :].decode(errors="replace")


class Runs:
    """Starts the command on one blend of two datasets.

    Args:
        folder: for the datasets.
        iterations: of a run.
        words: more flags.
    """

    def __init__(self, folder: Path, iterations: int, *words: str) -> None:
        data = ["0.7", write_dataset(folder / "a", 23, 0), "0.3", write_dataset(folder / "b", 9, 1)]
        self._words = [
            "-m", "megatron_eve.pretrain", "--preset", "eve_mini", "--global-batch-size", "6", "--seq-length", "384",
            "--train-iters", str(iterations), "--save-interval", "3", "--lr", "4e-5", "--data-path", *data, *words,
        ]  # fmt: skip
        self._started = 0

    def start(self, save: Path, data_parallel: int, *words: str) -> Run:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={data_parallel}"]
        command = [sys.executable, *launcher, *self._words, "--save", str(save), "--load", str(save), *words]
        self._started += 1
        return Run(command, save, f"{save}:{self._started}")


def lines_of(save: Path) -> list[dict[str, Any]]:
    """The whole lines of losses.jsonl; a kill may have cut the last one."""
    path = save / "losses.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def resumes_at(save: Path) -> int:
    """The iteration that the next start goes on from."""
    tracker = save / TRACKER
    return int(tracker.read_text()) if tracker.exists() else 0
