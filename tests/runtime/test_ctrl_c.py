"""Ctrl-C in a terminal: a run saves once and leaves, a second one kills it, and no command shows a traceback."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_eve.config import TRACKER

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
RUN = [
    "-m", "megatron_eve.pretrain", "--preset", "eve_mini", "--mock-data", "--seq-length", "512", "--train-iters",
    "100000", "--global-batch-size",
]  # fmt: skip


class Terminal:
    """A Python command in a terminal of its own, where Ctrl-C reaches what a real one reaches."""

    def __init__(self, words: list[str]) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=_own_the_terminal,
        )  # fmt: skip
        os.close(slave)
        self.output = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # nobody has the other side open any more
            while piece := os.read(self._master, 4096):
                self.output += piece.decode(errors="replace").replace("\r", "")

    def wait_for(self, there: str | Callable[[], bool]) -> None:
        """Until the output has a text, or something else is so."""
        deadline = time.monotonic() + 120
        while not (there in self.output if isinstance(there, str) else there()):
            assert self.process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def ctrl_c(self) -> None:
        os.write(self._master, b"\x03")

    def ends(self, seconds: float) -> int:
        """Its exit status, once it has ended by itself."""
        status = self.process.wait(seconds)
        time.sleep(0.2)  # the last of its output
        return status


def without_echo(output: str) -> str:
    """Output without "^C": the terminal echoes it after it sends the signal, so a program may print first."""
    return output.replace("^C", "")


def _own_the_terminal() -> None:
    """In the child: as a login shell leaves it, also where the tests themselves run with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextlib.contextmanager
def in_terminal(*words: str) -> Iterator[Terminal]:
    terminal = Terminal(list(words))
    try:
        yield terminal
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(terminal.process.pid)
            for one in [*process.children(recursive=True), process]:
                one.kill()
        terminal.process.wait()


def steps_done(folder: Path) -> int:
    losses = folder / "losses.jsonl"
    return losses.read_text().count("\n") if losses.exists() else 0


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["one rank", "torchrun"])
def test_ctrl_c_saves_once_and_leaves(tmp_path: Path, launcher: list[str]) -> None:
    with in_terminal(
        *launcher, *RUN, "4", "--save", str(tmp_path), "--async-save", "--save-interval", "2"
    ) as run:
        run.wait_for(lambda: steps_done(tmp_path) > 2)
        run.ctrl_c()
        status = run.ends(90)
    iteration = steps_done(tmp_path)
    ours = run.output.split("SignalException")[0]  # torchrun ends with a traceback of its own
    assert status == 1 if launcher else status == 130
    assert run.output.count("Ctrl-C: saving after this step, then leaving") == 1
    assert ("torchrun kills ranks that take longer than 30 s" in run.output) == bool(launcher)
    assert run.output.count(f"saved checkpoint at iteration {iteration} to ") == 1
    assert f"exiting at iteration {iteration} (SIGINT)" in run.output
    assert run.output.count("run ended   Ctrl-C (SIGINT)") == 1
    assert (tmp_path / TRACKER).read_text() == str(iteration)
    assert not list(tmp_path.glob("*.partial*")) and not (tmp_path / "lock").exists()
    assert "KeyboardInterrupt" not in ours and (launcher or "Traceback" not in ours)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "launcher", [[], pytest.param(TORCHRUN, marks=pytest.mark.slow)], ids=["one rank", "torchrun"]
)
def test_ctrl_c_twice_kills(launcher: list[str]) -> None:
    with in_terminal(*launcher, *RUN, "1024") as run:  # steps of many seconds
        run.wait_for("warning: no --save is given")
        started = psutil.Process(run.process.pid).children(recursive=True)
        time.sleep(1)
        run.ctrl_c()
        run.wait_for("Ctrl-C: leaving after this step (nothing is saved, as no --save was given)")
        time.sleep(0.5)
        run.ctrl_c()
        status = run.ends(10)
        assert psutil.wait_procs(started, timeout=5)[1] == []
    assert status == 1 if launcher else status == 130
    assert run.output.count("Ctrl-C again: stopped at once") == 1
    assert "exiting at iteration" not in run.output and "run ended" not in run.output
    assert launcher or "Traceback" not in run.output


def test_ctrl_c_before_the_first_step(tmp_path: Path) -> None:
    with in_terminal(*RUN, "4", "--save", str(tmp_path)) as run:
        run.wait_for("memory: ")
        run.ctrl_c()
        assert run.ends(10) == 130
    assert run.output.count("Ctrl-C: stopped before the first step; nothing was saved") == 1
    assert "Traceback" not in run.output
    assert not list(tmp_path.glob("iter_*"))


WAITS = """
import sys, time
from megatron_eve.runtime.errors import run_command
def work():
    print("at work", flush=True)
    time.sleep(60)
sys.exit(run_command(work, stopped="stopped; nothing was written"))
"""


def test_ctrl_c_in_a_command_is_one_line() -> None:
    with in_terminal("-c", WAITS) as command:
        command.wait_for("at work")
        command.ctrl_c()
        assert command.ends(10) == 130
    assert without_echo(command.output) == "at work\n\nstopped; nothing was written\n"


LOADS = """
import megatron_eve.runtime.interrupts
import time
print("loading", flush=True)
time.sleep(60)
"""


def test_ctrl_c_while_modules_load_is_one_line() -> None:
    with in_terminal("-c", LOADS) as command:
        command.wait_for("loading")
        command.ctrl_c()
        assert command.ends(10) == -signal.SIGINT
    assert without_echo(command.output) == "loading\n\nstopped\n"


@pytest.mark.parametrize("tool", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.stem)
def test_a_tool_prepares_for_that_before_it_loads_its_modules(tool: Path) -> None:
    ours = [
        line
        for line in tool.read_text().splitlines()
        if line.startswith(("import megatron", "from megatron"))
    ]
    assert not ours or ours[0].startswith("import megatron_eve.runtime.interrupts")
