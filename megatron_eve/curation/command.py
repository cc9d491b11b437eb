"""The work of `tools/curate.py STAGE`: opens the work folder, runs tasks, and says what came of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from megatron_eve.curation.engine import Outcome, default_workers, run_tasks
from megatron_eve.curation.inputs import INPUTS, Inputs, shard_files
from megatron_eve.curation.numbers import parse_numbers, ranges, shown
from megatron_eve.curation.rank import log_file
from megatron_eve.curation.stage import Stage
from megatron_eve.curation.stage_record import StageRecord, begin_stage, check_settings
from megatron_eve.curation.work import Work
from megatron_eve.data.errors import DataError
from megatron_eve.data.format.file_lock import lock_file

UNFINISHED_STATUS = 1
"""Exit status where shards are left unfinished."""


def curate(
    stage: Stage,
    folder: Path,
    *,
    patterns: Sequence[str] | None = None,
    workers: int | None = None,
    shards: str | None = None,
    list_unfinished: bool = False,
) -> int:
    """Run a stage on the shards that are not finished yet.

    Args:
        stage: with its settings.
        folder: the work folder.
        patterns: --input of the first stage; None for the shards that the folder has.
        workers: tasks at a time; None for the stage's own number, mostly one on each CPU core.
        shards: numbers of the shards that are run, such as "3,7-9"; None for all.
        list_unfinished: only print the numbers of unfinished tasks, such as "0,3,7-9", or "none".

    Returns:
        The exit status: 0 if all shards that were asked for are finished.

    Raises:
        DataError: a file or a folder cannot be used as asked for; or a task had such an error.
    """
    work = open_work(folder, patterns)
    if list_unfinished:
        words = ranges(check_settings(stage, work).unfinished(work))
        print(",".join(words) or "none")
        return 0
    check_installed()
    record = begin_stage(stage, work)
    asked = list(range(record.tasks)) if shards is None else parse_numbers(shards, record.tasks)
    unfinished = record.unfinished(work)
    todo = sorted(set(unfinished) & set(asked))
    workers = workers or stage.workers or default_workers()
    try:
        outcome = run_tasks(stage, work, record, todo, workers)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {_finished(record, work)}; the same command goes on") from None
    unfinished = record.unfinished(work)
    _print_summary(stage, work, record, outcome, len(asked) - len(todo), unfinished)
    return _close(stage, work, record, outcome, sorted(set(unfinished) & set(asked)))


def open_work(folder: Path, patterns: Sequence[str] | None) -> Work:
    """Open a work folder; with patterns, begin one, or check that it has these shards.

    Raises:
        DataError: there is no such folder, or it has other shards.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--work {folder} is a file: name a folder")
    if patterns is None:
        return Work.open(folder)
    if not (folder / INPUTS).exists():  # nothing is made for a mistake in --input
        shard_files(patterns)
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_file(folder / f"{INPUTS}.lock", wait=True)
    assert lock is not None
    with lock:
        inputs = Inputs.read(folder)
        if inputs is None:
            inputs = Inputs.of(patterns)
            inputs.write(folder)
            return Work(folder, inputs)
    inputs.compare(patterns, folder)
    return Work(folder, inputs)


def check_installed() -> None:
    """Raise DataError where the packages of curation are not installed."""
    names = {"datatrove": "datatrove", "imagehash": "imagehash", "faiss": "faiss-cpu"}
    if missing := [package for module, package in names.items() if find_spec(module) is None]:
        raise DataError(f"{', '.join(missing)} is not installed: make install-curate")


def _finished(record: StageRecord, work: Work) -> str:
    left = len(record.unfinished(work))
    if record.tasks == 1:
        return f"the stage {record.stage} is {'unfinished' if left else 'finished'}"
    return f"{record.tasks - left} of {record.tasks} shards are finished"


def _print_summary(
    stage: Stage, work: Work, record: StageRecord, outcome: Outcome, before: int, unfinished: list[int]
) -> None:
    """Print what was done; once all shards are finished, what the stage has to report."""
    rows = [
        (
            "shards",
            f"{record.tasks - len(unfinished):,} of {record.tasks:,} finished, {before:,} of them before",
        )
    ]
    if outcome.lost:
        rows.append(
            (
                "made again",
                f"{len(outcome.lost)}, marked as finished without their files: {shown(sorted(outcome.lost))}",
            )
        )
    if outcome.unmarked:
        rows.append(
            (
                "made again",
                f"{len(outcome.unmarked)}, whose files had no mark of completion: {shown(sorted(outcome.unmarked))}",
            )
        )
    if not unfinished:
        # The last tasks of an array may end together, and a report writes a page.
        lock = lock_file(work.stage_folder(stage.name) / "report.lock", wait=True)
        assert lock is not None
        with lock:
            rows += stage.report(work)
    width = max(len(label) for label, _ in rows) + 2
    print("\n".join(f"{label:<{width}}{text}" for label, text in rows), flush=True)


def _close(stage: Stage, work: Work, record: StageRecord, outcome: Outcome, left: list[int]) -> int:
    """Say which tasks are unfinished, and why; returns the exit status.

    Raises:
        DataError: the user has to correct something first.
    """
    if not left:
        return 0
    what = f"{len(left)} of {record.tasks} shards unfinished: {shown(left)}"
    if record.tasks == 1:
        what = f"the stage {stage.name} is unfinished"
    lines = [f"{what}; the same command {'finishes them' if record.tasks > 1 else 'finishes it'}"]
    for text, ended in outcome.failures.items():
        tasks = [task for task in ended if task in left]  # one may be killed after its last file
        if not tasks:
            continue
        printed = log_file(work.folder, stage.name, min(tasks))
        lines.append(f"  {_which(record, tasks)}: {text}; what it printed is in {printed}")
    if outcome.busy:
        lines.append(f"  {_which(record, outcome.busy)}: another command is making it")
    if outcome.mistakes:
        raise DataError("\n".join([*outcome.mistakes, lines[0] + " once this is corrected", *lines[1:]]))
    print("\n".join(lines), file=sys.stderr, flush=True)
    return UNFINISHED_STATUS


def _which(record: StageRecord, tasks: list[int]) -> str:
    return f"shard{'s' * (len(tasks) > 1)} {shown(sorted(tasks))}" if record.tasks > 1 else record.stage
