"""Signals that ask a run to save and exit, and a watchdog for steps that do not end."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_eve.runtime.errors import note_sigterm

# Slurm sends SIGTERM before it preempts or cancels a job, and the batch scripts SIGUSR1 before the time limit.
EXIT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class ExitSignals:
    """Catches the signals that ask a run to save and exit. A context manager around the whole run."""

    def __init__(self) -> None:
        self._caught: int = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> ExitSignals:
        for number in EXIT_SIGNALS:
            self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._caught = number
        if number == signal.SIGTERM:
            note_sigterm()

    def received(self) -> str | None:
        """Name of the signal that any rank has caught, the same on every rank; None if none has. Collective."""
        import torch  # not at the top: signals are caught before torch is imported, which takes seconds

        from megatron_eve.runtime.accelerator import accelerator

        caught = torch.tensor([self._caught], dtype=torch.int32, device=accelerator().device)
        torch.distributed.all_reduce(caught, op=torch.distributed.ReduceOp.MAX)
        return signal.Signals(int(caught)).name if int(caught) else None


@contextmanager
def exit_signals_ignored() -> Iterator[None]:
    """Processes started inside this block ignore the exit signals, which Slurm sends to every process of a job."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in EXIT_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Make this process, spawned by multiprocessing, exit when its parent does, even if the parent is killed.

    Call it first. Processes that the parent has forked hold the same pipe, so this process ends only when they have
    ended, too.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was not started by multiprocessing"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end with parent", daemon=True).start()


class Watchdog:
    """Ends a rank whose step takes too long, after printing the stack of each thread.

    Collectives have a timeout of their own, which ends ranks that wait for a hung one. The watchdog is set a little
    shorter, so that the log also holds the stacks of the rank that hangs.
    """

    def __init__(self, seconds: float) -> None:
        """
        Args:
            seconds: longest time between two calls of `feed`.
        """
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def feed(self) -> None:
        """Restart the timer; called after each step."""
        self._deadline = time.monotonic() + self._seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the timer inside this block, for work that may take long: an evaluation, a checkpoint."""
        self._deadline = float("inf")
        yield
        self.feed()

    def close(self) -> None:
        """Stop watching."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._seconds / 10)):
            if time.monotonic() > self._deadline:
                print(
                    f"rank {os.environ.get('RANK', '0')}: no step has ended for {self._seconds:.0f} s, so the run ends "
                    "here; what its threads were doing:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(1)
