"""Starting commands with a log each, following what they report, and killing exactly what was started."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.1


class StepFailed(Exception):
    """A step of the quickstart did not do what it must; the message says which and where its log is."""


def module(ranks: int, name: str, *arguments: object) -> list[str]:
    """The words of `torchrun --nproc-per-node RANKS -m NAME ...` under this interpreter; one rank needs no torchrun."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks)
    return words(sys.executable, *(torchrun if ranks > 1 else ()), "-m", name, *arguments)


def words(*parts: object) -> list[str]:
    """The parts of a command line as strings."""
    return [str(part) for part in parts]


def shown(word: object) -> str:
    """A path as one would type it: relative to the repository where it lies inside."""
    path = Path(str(word))
    return str(path.relative_to(ROOT)) if path.is_absolute() and path.is_relative_to(ROOT) else str(word)


class Command:
    """A command running from the repository's root, with its output in a log file.

    Use it as a context manager: whatever is still running at the end of the block is killed.

    Args:
        command: words; the first is the program.
        log: file for stdout and stderr together.
    """

    def __init__(self, command: list[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._file: TextIO = log.open("w", encoding="utf-8")
        # One thread a rank: four ranks share two cores, and the order of additions stays the same in every run.
        # Four ranks on CPUs, also where there is a GPU.
        mine = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, **mine}
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.running:
            self.kill()
        self._file.close()

    @property
    def running(self) -> bool:
        """Whether the command has not ended yet."""
        return self._process.poll() is None

    def output(self) -> str:
        """What the command has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self) -> str:
        """Wait for the end.

        Returns:
            What the command printed.

        Raises:
            StepFailed: it ended with a status other than 0.
        """
        status = self._process.wait()
        if status != 0:
            raise StepFailed(
                f"the command ended with status {status}; from {self.log}:\n{self._last_words()}"
            )
        return self.output()

    def _last_words(self) -> str:
        """The end of the output, without torchrun's own report on its ranks, which says nothing of the cause."""
        lines = self.output().splitlines()
        report = next((i for i, line in enumerate(lines) if "torch/distributed/elastic" in line), len(lines))
        return "\n".join(lines[:report][-20:])

    def kill(self) -> int:
        """SIGKILL to the command and all its descendants, torchrun's ranks among them, each by its own id.

        torchrun starts every rank in a session of its own, so a process group would not reach them.

        Returns:
            How many processes were killed.
        """
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self._process.pid)
            family = [parent, *parent.children(recursive=True)]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=10)
            self._process.wait()
            return len(family)
        return 0


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, in the order written; a line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline is not whole
    return [json.loads(line) for line in lines]


def follow(command: Command, losses: Path) -> Iterator[dict[str, Any]]:
    """Yield the records that a training command adds to its losses.jsonl, as they come, until it ends."""
    seen = len(read_records(losses))
    while True:
        running = command.running  # asked first, so that the last records are read after the end
        records = read_records(losses)
        yield from records[seen:]
        seen = len(records)
        if not running:
            return
        time.sleep(POLL_SECONDS)
