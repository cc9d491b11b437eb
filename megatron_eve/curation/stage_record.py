"""`StageRecord`, WORK/STAGE/stage.json: with which settings and from what a stage was made, and what is unfinished."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_eve.curation.inputs import INPUTS
from megatron_eve.curation.json_files import write_json
from megatron_eve.curation.numbers import shown
from megatron_eve.curation.stage import Stage
from megatron_eve.curation.stage_names import STAGES
from megatron_eve.curation.work import EMPTY, STAGE_FILE, Work
from megatron_eve.data.errors import DataError
from megatron_eve.data.format.file_lock import lock_file

LOGS = "logs"


@dataclass(frozen=True)
class StageRecord:
    """What stage.json holds.

    Attributes:
        stage: name of the stage.
        settings: those that decide its results.
        made_from: digests of inputs.json and of the stage.json of the stages that were there before it.
        tasks: number of tasks: as many as shards, or one.
        shards: number of shards.
        suffixes: of its files for each shard.
        files: names of its other files.
        made: a random number in hexadecimal digits, so that stages made from this one know when it is made anew with
            the same settings: captions, for example, may be others then.
    """

    stage: str
    settings: dict[str, Any]
    made_from: dict[str, str]
    tasks: int
    shards: int
    suffixes: tuple[str, ...]
    files: tuple[str, ...]
    made: str

    @classmethod
    def of(cls, stage: Stage, work: Work, made_from: dict[str, str]) -> StageRecord:
        """The record of a stage as it would be made now."""
        tasks = len(work.inputs) if stage.per_shard else 1
        settings = json.loads(json.dumps(stage.settings()))  # tuples become lists, as in the file
        return cls(
            stage.name,
            settings,
            made_from,
            tasks,
            len(work.inputs),
            tuple(stage.suffixes),
            tuple(stage.files),
            made=uuid.uuid4().hex,
        )

    @classmethod
    def read(cls, work: Work, stage: str) -> StageRecord | None:
        """The record in a work folder; None where the stage has not been begun.

        Raises:
            DataError: it is damaged.
        """
        path = work.stage_folder(stage) / STAGE_FILE
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**found, "suffixes": tuple(found["suffixes"]), "files": tuple(found["files"])})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is damaged ({error}): delete the folder {path.parent} and run the stage again"
            ) from error

    @cached_property
    def digest(self) -> str:
        """The sha256 of the record, in hexadecimal digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def write(self, work: Work) -> None:
        """Write stage.json."""
        write_json(work.stage_folder(self.stage) / STAGE_FILE, asdict(self))

    def outputs(self, task: int) -> list[str]:
        """Names of the files that a task makes in the folder of the stage."""
        shards = [task] if self.tasks == self.shards and not self.files else range(self.shards)
        return [*self.files, *(f"{shard:05d}{suffix}" for shard in shards for suffix in self.suffixes)]

    def unfinished(self, work: Work) -> list[int]:
        """Tasks without a mark of completion, or of which a file is missing; by listing folders, not file by file."""
        folder = work.stage_folder(self.stage)
        there, marks = (
            _names(folder),
            _names(folder / LOGS / "completions") & _names(folder / LOGS / "stats", ".json"),
        )
        return [
            task
            for task in range(self.tasks)
            if f"{task:05d}" not in marks or _missing(self.outputs(task), there)
        ]

    def missing(self, work: Work, task: int) -> list[str]:
        """Names of the files of a task that are not there."""
        return _missing(self.outputs(task), _names(work.stage_folder(self.stage)))

    def counts(self, work: Work) -> Counter[str]:
        """The counts that `Stage.run` returned, added up over all finished tasks, from datatrove's statistics.

        Raises:
            DataError: statistics that are damaged.
        """
        total: Counter[str] = Counter()
        for path in (work.stage_folder(self.stage) / LOGS / "stats").glob("*.json"):
            try:
                (step,) = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise DataError(
                    f"{path} is damaged ({error}): delete it and run tools/curate.py {self.stage} again"
                ) from error
            total.update({label: int(_total(value)) for label, value in step["stats"].items()})
        return total


def _total(value: float | dict[str, float]) -> float:
    """The sum in one of datatrove's statistics, which writes a plain number where it has nothing else to say."""
    return value["total"] if isinstance(value, dict) else value


def _missing(outputs: list[str], there: set[str]) -> list[str]:
    return [name for name in outputs if name not in there and f"{name}{EMPTY}" not in there]


def _names(folder: Path, suffix: str = "") -> set[str]:
    """Names in a folder, without a suffix; none where there is no such folder."""
    try:
        return {entry.name.removesuffix(suffix) for entry in os.scandir(folder)}
    except FileNotFoundError:
        return set()


def begin_stage(stage: Stage, work: Work) -> StageRecord:
    """Check that a stage can be made, from stages that are finished, and write its stage.json if it is new.

    Raises:
        DataError: an earlier stage is missing or unfinished, or was made again since; or the stage was begun with
            other settings or from something else.
        UserError: what `Stage.check` finds.
    """
    record = StageRecord.of(stage, work, _earlier(stage, work))
    stage.check(work)
    folder = work.stage_folder(stage.name)
    folder.mkdir(exist_ok=True)
    lock = lock_file(folder / "stage.lock", wait=True)
    assert lock is not None
    with lock:
        found = StageRecord.read(work, stage.name)
        if found is None:
            record.write(work)
            return record
    _compare(work, found, record)
    return found


def check_settings(stage: Stage, work: Work) -> StageRecord:
    """The record of a stage, without a look at the stages before it; nothing is written.

    Raises:
        DataError: the stage was begun with other settings.
    """
    found = StageRecord.read(work, stage.name)
    record = StageRecord.of(stage, work, found.made_from if found else {})
    if found is None:
        return record
    _compare(work, found, record)
    return found


def _earlier(stage: Stage, work: Work) -> dict[str, str]:
    """Digests of what the stage is made from; raises DataError as `begin_stage`."""
    made_from = {INPUTS: work.inputs.digest}
    for name in STAGES[: STAGES.index(stage.name)]:
        record = StageRecord.read(work, name)
        if record is None:
            if name in stage.needs:
                raise DataError(
                    f"{work.folder} has no stage {name}, which {stage.name} reads: run tools/curate.py {name} first"
                )
            continue
        if record.made_from != made_from:
            raise DataError(f"{_stale(work, name, record.made_from, made_from)}: {_again(work, name)}")
        if unfinished := record.unfinished(work):
            raise DataError(
                f"{len(unfinished)} of {record.tasks} shards of the stage {name} in {work.folder} are unfinished "
                f"({shown(unfinished)}): run tools/curate.py {name} again first"
            )
        made_from[name] = record.digest
    return made_from


def _compare(work: Work, found: StageRecord, record: StageRecord) -> None:
    """Raise DataError if a stage that was begun differs from what would be made now."""
    folder = work.stage_folder(record.stage)
    for name in {**found.settings, **record.settings}:
        before, now = found.settings.get(name), record.settings.get(name)
        if before != now:
            raise DataError(
                f"{folder} was begun with {name} = {_value(before)}, and this command has {_value(now)}: give the same "
                f"flags, or delete the folder {folder} to make it again"
            )
    if found.made_from != record.made_from:
        stale = _stale(work, record.stage, found.made_from, record.made_from)
        raise DataError(f"{stale}: {_again(work, record.stage)}")
    if replace(found, made="") != replace(record, made=""):
        raise DataError(
            f"{folder} was begun by another version of this command: {_again(work, record.stage)}"
        )


def _stale(work: Work, stage: str, before: dict[str, str], now: dict[str, str]) -> str:
    """What has changed since a stage was made."""
    folder = work.stage_folder(stage)
    for name in {**now, **before}:
        if name not in before:
            return f"{folder} was made before the stage {name} was run"
        if name not in now:
            return f"{folder} was made from the stage {name}, which is not there any more"
        if before[name] != now[name]:
            return f"{folder} was made from another {name}"
    raise AssertionError("nothing has changed")


def _again(work: Work, stage: str) -> str:
    return f"delete the folder {work.stage_folder(stage)} and run tools/curate.py {stage} again"


def _value(value: object) -> str:
    return json.dumps(value)
