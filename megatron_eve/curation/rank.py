"""One task of a stage, in a process of its own: datatrove runs it, with its completions, statistics and logs."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_eve.curation.stage import Stage
from megatron_eve.curation.stage_record import LOGS, StageRecord
from megatron_eve.curation.work import Work
from megatron_eve.data.format.file_lock import lock_file
from megatron_eve.runtime.errors import UserError
from megatron_eve.runtime.signals import end_with_parent

# Characters of an error that are sent: a pipe takes 64 KiB before it is read, which is when this process has ended.
_LONGEST = 4000


@dataclass(frozen=True)
class Result:
    """What a task tells the command that started it.

    Attributes:
        kind: "done"; "there", if it was finished already; "busy", if another command works on it; "mistake", an error
            that the user can fix; "bug", any other error.
        text: the error's sentence; for "done", why it had to be made again: "lost" or "unmarked", mostly "".
    """

    kind: str
    text: str = ""


def run_rank(connection: Connection, stage: Stage, folder: Path, record: StageRecord, task: int) -> None:
    """The whole life of the process of one task: its `Result` is sent, and what it prints goes to a file."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends this one
    _print_to(log_file(folder, stage.name, task))
    try:
        connection.send(_make(stage, Work.open(folder), record, task))
    except (UserError, OSError) as error:
        traceback.print_exc()
        connection.send(Result("mistake", str(error)[:_LONGEST]))
        sys.exit(2)
    except Exception as error:
        traceback.print_exc()
        connection.send(Result("bug", f"{type(error).__name__}: {error}"[:_LONGEST]))
        sys.exit(1)


def log_file(folder: Path, stage: str, task: int) -> Path:
    """Where a task prints to, tracebacks too."""
    return folder / stage / LOGS / "output" / f"{task:05d}.txt"


def _print_to(path: Path) -> None:
    """Send all that this process prints to a file, native code and datatrove's own lines too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def _make(stage: Stage, work: Work, record: StageRecord, task: int) -> Result:
    """Make the files of a task unless they are there."""
    logs = work.stage_folder(stage.name) / LOGS
    with _locked(logs / "locks" / f"{task:05d}") as free:
        if not free:
            return Result("busy")
        mark = logs / "completions" / f"{task:05d}"
        whole = not record.missing(work, task)
        if mark.exists():
            if whole and (logs / "stats" / f"{task:05d}.json").exists():
                return Result("there")
            mark.unlink()
            again = "lost"
        else:
            again = "unmarked" if whole else ""
        _execute(stage, work, record, task)
        return Result("done", again)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether this process alone works on a task, during the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_file(path)
    if lock is None:
        yield False
        return
    with lock:
        yield True


def _execute(stage: Stage, work: Work, record: StageRecord, task: int) -> None:
    """Let datatrove run a task, and mark it as completed once all its files are there."""
    # Only here: the process that starts the tasks does not need datatrove.
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.base import PipelineStep

    class Step(PipelineStep):
        """The stage as the one step of the pipeline."""

        def __init__(self) -> None:
            self.type, self.name = "curate", stage.name
            super().__init__()

        def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
            for label, count in stage.run(work, task).items():
                self.stat_update(label, value=count)
            missing = record.missing(work, task)
            assert not missing, f"the stage {stage.name} has not written {missing[:3]}"

    class Executor(LocalPipelineExecutor):
        """One task in this process, without the manager process, which would outlive a task that is killed."""

        def run(self) -> Any:
            return self._run_for_rank(self.local_rank_offset)

    logs = str(work.stage_folder(stage.name) / LOGS)
    Executor(
        [Step()], tasks=record.tasks, workers=1, logging_dir=logs, local_tasks=1, local_rank_offset=task
    ).run()
