"""Runs the tasks of a stage on this machine, each in a process of its own, and watches them.

datatrove's own pool waits for ever when one of its processes is killed. Here the others go on, and the tasks that did
not end well are named when the rest is done; the same command then makes what is missing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess

from megatron_eve.curation.rank import Result, run_rank
from megatron_eve.curation.stage import Stage
from megatron_eve.curation.stage_record import StageRecord
from megatron_eve.curation.work import Work
from megatron_eve.runtime.progress_bar import byte_progress

_LOOK_SECONDS = 1.0  # between two looks at processes whose end was not signalled
_END_SECONDS = 10.0  # that a process has to end in
_OUT_OF_MEMORY = ", as the system does when memory runs out (fewer --workers need less)"


@dataclass
class Outcome:
    """What became of the tasks of a command.

    Attributes:
        lost: tasks made again, since their mark of completion was there and a file was not.
        unmarked: tasks made again, since their files were there and the mark was not.
        busy: tasks that another command is making.
        mistakes: errors that the user can fix -> the tasks that had them.
        failures: what else went wrong -> the tasks.
    """

    lost: list[int] = field(default_factory=list)
    unmarked: list[int] = field(default_factory=list)
    busy: list[int] = field(default_factory=list)
    mistakes: dict[str, list[int]] = field(default_factory=dict)
    failures: dict[str, list[int]] = field(default_factory=dict)

    def add(self, task: int, result: Result) -> None:
        """Count the result of a task."""
        if result.kind == "done" and result.text:
            (self.lost if result.text == "lost" else self.unmarked).append(task)
        elif result.kind == "busy":
            self.busy.append(task)
        elif result.kind in ("mistake", "bug"):
            where = self.mistakes if result.kind == "mistake" else self.failures
            where.setdefault(result.text, []).append(task)


def default_workers() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def run_tasks(stage: Stage, work: Work, record: StageRecord, tasks: Iterable[int], workers: int) -> Outcome:
    """Run tasks of a stage, `workers` at a time, and return when all have ended, in whatever way.

    Args:
        stage, work: what is run.
        record: stage.json of the stage.
        tasks: numbers of the tasks.
        workers: processes at a time.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; all processes have been ended.
    """
    waiting, outcome = deque(tasks), Outcome()
    others = multiprocessing.active_children()
    sizes = work.inputs.sizes if stage.per_shard else (sum(work.inputs.sizes),)
    running: dict[int, tuple[SpawnProcess, Connection]] = {}
    threads = max(1, default_workers() // max(1, min(workers, len(waiting))))
    with (
        _sigterm_as_ctrl_c(),
        _threads(threads),
        byte_progress(stage.name, sum(sizes[t] for t in waiting)) as advance,
    ):
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    task = waiting.popleft()
                    running[task] = _start(stage, work, record, task)
                for task in _ended(running):
                    outcome.add(task, _result(*running.pop(task)))
                    advance(sizes[task])
        finally:
            _end([process for process in multiprocessing.active_children() if process not in others])
            for _, connection in running.values():
                connection.close()
    return outcome


def _start(stage: Stage, work: Work, record: StageRecord, task: int) -> tuple[SpawnProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run_rank, args=(theirs, stage, work.folder, record, task))
    process.start()
    theirs.close()
    return process, ours


def _ended(running: dict[int, tuple[SpawnProcess, Connection]]) -> list[int]:
    """Wait until a process has ended; returns the tasks of those that have."""
    while True:
        # A process that the task has forked keeps the sentinel open, hence the look at the exit codes.
        wait([process.sentinel for process, _ in running.values()], _LOOK_SECONDS)
        if ended := [task for task, (process, _) in running.items() if process.exitcode is not None]:
            return ended


def _result(process: SpawnProcess, connection: Connection) -> Result:
    """What a process has sent, or how it ended if it sent nothing."""
    with connection:
        try:
            if connection.poll():
                found: Result = connection.recv()
                return found
        except (EOFError, OSError):
            pass
    code = process.exitcode or 0
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return Result("bug", f"the process {how}{_OUT_OF_MEMORY if code == -signal.SIGKILL else ''}")


def _end(processes: Sequence[BaseProcess]) -> None:
    """End processes that still run after an error or Ctrl-C; one that was being started is not in any list of ours."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(_END_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """During the block SIGTERM, with which Slurm ends a job, is a Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Processes started inside this block compute with so many threads, unless the user's environment says so."""
    name = "OMP_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(count)
    try:
        yield
    finally:
        del os.environ[name]
