"""Signals that ask a run to save and exit, Ctrl-C, and a watchdog for steps that do not end."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from megatron_eve.runtime.errors import INTERRUPTED_STATUS, note_sigterm

# Slurm sends SIGTERM before it preempts or cancels a job, and the batch scripts SIGUSR1 before the time limit.
EXIT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Two SIGINTs closer than this are one Ctrl-C: it may reach a rank from the terminal and from its launcher.
_SAME_CTRL_C_SECONDS = 0.3


class ExitSignals:
    """Catches the signals that ask a run to save and exit, and Ctrl-C. A context manager around the whole run.

    SIGINT (Ctrl-C) ends a run that is still starting at once. During training the run saves after the step and leaves;
    a second SIGINT kills it. torchrun passes the first Ctrl-C on as SIGINT and the second as SIGTERM, so SIGTERM after
    SIGINT kills, too. A thread sees to SIGINT, since a handler of Python waits for the main thread, which may be inside
    a long call, such as a collective that waits for a rank that hangs.
    """

    def __init__(self) -> None:
        self._caught: int = 0
        self._before: dict[signal.Signals, object] = {}
        self._interrupted: float | None = None  # time of the first SIGINT
        self._answer: str | None = None  # to the first SIGINT; None while the run starts
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> ExitSignals:
        for number in EXIT_SIGNALS:
            self._before[number] = signal.signal(number, self._catch)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # which a shell's background jobs inherit
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
        # Python writes the number of each signal into this pipe as it arrives.
        self._pipe = reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="Ctrl-C", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        assert self._pipe is not None
        os.close(self._pipe[1])  # which ends the thread

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._caught = number
        if number == signal.SIGTERM:
            note_sigterm()

    def _watch(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGINT:
                self._interrupt()
            elif number[0] == signal.SIGTERM and self._interrupted is not None:
                self._stop_now()
        os.close(reader)

    def _interrupt(self) -> None:
        if self._answer is None:
            _say("Ctrl-C: stopped before the first step; nothing was saved")
            os._exit(INTERRUPTED_STATUS)
        if self._interrupted is None:
            self._interrupted, self._caught = time.monotonic(), signal.SIGINT
            _say(f"Ctrl-C: {self._answer}; press again to stop at once")
        elif time.monotonic() - self._interrupted > _SAME_CTRL_C_SECONDS:
            self._stop_now()

    def _stop_now(self) -> None:
        """Kill this process and those that it has started, such as the writers of a checkpoint."""
        _say("Ctrl-C again: stopped at once; a checkpoint that was being written is not used")
        with contextlib.suppress(Exception):
            import psutil

            for child in psutil.Process().children(recursive=True):
                child.kill()
        os._exit(INTERRUPTED_STATUS)

    def begin_training(self, save: str | None) -> None:
        """From now on Ctrl-C ends the run after its step, with a checkpoint if it has a folder for that (`--save`)."""
        end = "saving after this step, then leaving"
        if save is None:
            end = "leaving after this step (nothing is saved, as no --save was given)"
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end += "; torchrun kills ranks that take longer than 30 s for that"
        self._answer = end

    def end_training(self) -> None:
        """From now on Ctrl-C only says that the run is ending."""
        self._answer = "the run is ending already"

    def exchange(self, values: Sequence[float] = ()) -> tuple[str | None, list[float]]:
        """What all ranks have to know after a step, in one reduction. Collective.

        Args:
            values: of this rank, as many on every rank.

        Returns:
            Name of the signal that any rank has caught, None if none has; and the largest of each value over all ranks.
        """
        import torch  # not at the top: signals are caught before torch is imported, which takes seconds

        from megatron_eve.runtime.accelerator import accelerator

        told = torch.tensor([self._caught, *values], dtype=torch.float64, device=accelerator().device)
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        caught, *largest = told.tolist()
        return signal.Signals(int(caught)).name if caught else None, largest


def _say(sentence: str) -> None:
    """Print a line on rank 0, on stderr; on a terminal below the ^C that it shows."""
    if os.environ.get("RANK", "0") == "0":
        below = "\n" * os.isatty(2)
        with contextlib.suppress(OSError):
            os.write(2, f"{below}{sentence}\n".encode())


def _leave_ctrl_c_to_parent() -> None:
    """In a forked process, such as a writer of a checkpoint: Ctrl-C reaches it, too, and is its parent's matter.

    Its copy of the pipe is the parent's, which would count the signal twice.
    """
    with contextlib.suppress(ValueError, OSError):
        if signal.set_wakeup_fd(-1) != -1:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


os.register_at_fork(after_in_child=_leave_ctrl_c_to_parent)


@contextmanager
def exit_signals_ignored() -> Iterator[None]:
    """Processes started inside this block ignore the exit signals and Ctrl-C, which reach every process of a job."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (*EXIT_SIGNALS, signal.SIGINT)}
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
