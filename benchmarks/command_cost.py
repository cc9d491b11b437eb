"""Measures wall time, CPU time and peak memory of one run of a command. Not a benchmark."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
PREPROCESS = (sys.executable, str(ROOT / "tools" / "preprocess_data.py"))
_BETWEEN = 0.1  # seconds between samples of the memory


@dataclass
class Memory:
    """Peak memory of one process, MiB.

    Attributes:
        resident: VmHWM of Linux, with pages of mapped files.
        anonymous: largest sampled RssAnon, without pages of mapped files.
    """

    resident: float = 0.0
    anonymous: float = 0.0

    def update(self, pid: int) -> None:
        """Sample the memory of the process; a process that has ended is ignored."""
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        found = dict(line.split(":", 1) for line in lines if ":" in line)
        if "VmHWM" in found:  # a process that has just ended has no memory
            self.resident = max(self.resident, int(found["VmHWM"].split()[0]) / 1024)
            self.anonymous = max(self.anonymous, int(found["RssAnon"].split()[0]) / 1024)


@dataclass
class CommandCost:
    """Cost of one run.

    Attributes:
        seconds: from start to end.
        cpu: user and system seconds of the process and of the workers it waited for.
        status: exit status.
        output: stdout and stderr.
        parent: memory of the process itself.
        workers: memory of each process that it started, by its pid.
    """

    seconds: float
    cpu: float
    status: int
    output: str
    parent: Memory = field(default_factory=Memory)
    workers: dict[int, Memory] = field(default_factory=dict)

    @property
    def worker(self) -> Memory:
        """Largest peaks over all workers."""
        found = self.workers.values()
        return Memory(
            max((one.resident for one in found), default=0.0),
            max((one.anonymous for one in found), default=0.0),
        )


def run_command(command: Sequence[str], *, memory: bool = False) -> CommandCost:
    """Run a command and measure it.

    Args:
        command: program and arguments.
        memory: whether to sample the memory of the process and its children, ten times a second.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        cost = CommandCost(0.0, 0.0, 0, "")
        while memory and os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            _update_memory(process.pid, cost)
            time.sleep(_BETWEEN)
        _, status, used = os.wait4(process.pid, 0)
        cost.seconds = time.perf_counter() - began
        cost.cpu = used.ru_utime + used.ru_stime
        cost.status = process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        cost.output = output.read()
    return cost


def _update_memory(pid: int, cost: CommandCost) -> None:
    cost.parent.update(pid)
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for child in children:
        cost.workers.setdefault(child.pid, Memory()).update(child.pid)


def preprocess_command(settings: Mapping[str, Any]) -> list[str]:
    """Command line of tools/preprocess_data.py for these fields of `PreprocessConfig`."""
    command = [*PREPROCESS, "--overwrite"]  # of rounds, each of which writes the same
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return command


def run_preprocess(settings: Mapping[str, Any], *, memory: bool = False) -> CommandCost:
    """Run tools/preprocess_data.py; if it fails, exit with its output."""
    cost = run_command(preprocess_command(settings), memory=memory)
    if cost.status:
        sys.exit(f"error: preprocessing of {settings['input']} failed:\n{cost.output[-3000:]}")
    return cost
