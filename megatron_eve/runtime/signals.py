"""What can end a run from outside: a signal that asks it to leave, and a step that never ends."""

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
    """Catches the signals that ask a run to save and leave; use it as a context manager around the whole of it."""

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
        """Name of a signal that any rank has caught, the same on every rank; None without one. Collective."""
        import torch  # not at the top: signals are caught before torch, which takes seconds, is imported

        from megatron_eve.runtime.accelerator import accelerator

        caught = torch.tensor([self._caught], dtype=torch.int32, device=accelerator().device)
        torch.distributed.all_reduce(caught, op=torch.distributed.ReduceOp.MAX)
        return signal.Signals(int(caught)).name if int(caught) else None


@contextmanager
def exit_signals_ignored() -> Iterator[None]:
    """Processes that are started in here ignore the signals, which Slurm sends to all of a job's processes."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in EXIT_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Called first thing in a process that multiprocessing has spawned, which else outlives a parent that is killed.

    The pipe that tells of the parent's end is also held by what the parent has forked, so this process serves that to
    its end.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was not started by multiprocessing"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end with parent", daemon=True).start()


class Watchdog:
    """Ends a rank whose step takes far too long, and shows what each of its threads was doing.

    A rank that waits for a lost one is ended by its collective's timeout; this also finds the rank that others wait
    for, a little earlier, so that every rank's stacks are in the log.
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
        """A step has ended: wait anew."""
        self._deadline = time.monotonic() + self._seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch what may rightly take long: an evaluation, a checkpoint."""
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
