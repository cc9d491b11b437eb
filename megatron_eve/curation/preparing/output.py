"""The folder of a prepared download: shards, the counts of each, and the manifest.

OUT/00000.parquet      records (`data/schema.py`)
OUT/preparing.json     the settings, written first; removed at the end
OUT/counts/00000.json  what became of the rows of a shard, written once the shard is complete; removed at the end
OUT/skipped.jsonl      rows that were left out
OUT/prepared.json      the manifest, written last
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from megatron_eve.checkpoint.files import sync_to_disk
from megatron_eve.curation.json_files import write_json
from megatron_eve.curation.preparing.reasons import PREPARING_REASONS
from megatron_eve.data.errors import DataError
from megatron_eve.data.format.file_lock import lock_file
from megatron_eve.data.format.metadata import largest_licenses, license_of
from megatron_eve.data.schema import Record

MANIFEST = "prepared.json"
"""Name of the manifest."""
SKIPPED = "skipped.jsonl"
"""Name of the list of rows that were left out."""

_SETTINGS = "preparing.json"
_COUNTS = "counts"
_LOCK = ".lock"
_OF_A_SHARD = re.compile(r"\d{5,}\.parquet(\.partial)?")
_FIRST_SKIPPED = 5  # rows that the manifest names for each reason


@dataclass
class ShardCounts:
    """What became of the rows of one shard.

    Attributes:
        rows_read: of the download.
        rows: that the shard has.
        images: pictures of these rows.
        images_missing: pictures without a file, which rows go on without.
        changes: what was changed of rows that were kept, by the names of `data/reasons.py` CHANGES.
        licenses: rows by license, those without one as "".
        skipped: rows that were left out, by reason.
        skipped_rows: the first 100 of each reason: file, row, reason, detail, id, image.
    """

    rows_read: int = 0
    rows: int = 0
    images: int = 0
    images_missing: int = 0
    changes: Counter[str] = field(default_factory=Counter)
    licenses: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Count a record that is kept."""
        self.images += len(record.images)
        self.images_missing += record.num_missing
        self.changes.update(record.changes)
        self.licenses[license_of(record.meta) or ""] += 1


@dataclass(frozen=True)
class PreparedData:
    """The manifest of a prepared download.

    Attributes:
        settings: see `PrepareConfig.settings`.
        shards: file name -> rows.
        rows_read, rows, images, images_missing, changes, licenses, skipped: sums of `ShardCounts`.
        skipped_first: the first rows of each reason.
        files_left_out: files of test and validation splits.
        dead_links: pictures that the download says could not be downloaded.
        new: this command finished it; not in the file.
    """

    settings: dict[str, Any]
    shards: dict[str, int]
    rows_read: int
    rows: int
    images: int
    images_missing: int
    changes: dict[str, int]
    licenses: dict[str, int]
    skipped: dict[str, int]
    skipped_first: dict[str, list[dict[str, Any]]]
    files_left_out: list[str]
    dead_links: int
    new: bool = True


def shard_path(folder: Path, shard: int) -> Path:
    """The parquet file of a shard."""
    return folder / f"{shard:05d}.parquet"


def write_counts(folder: Path, shard: int, counts: ShardCounts) -> None:
    """Write the counts of a shard, which says that it is complete, so the shard must be on the disk before."""
    if counts.rows:
        sync_to_disk(shard_path(folder, shard))
    write_json(_counts_path(folder, shard), vars(counts))


def _counts_path(folder: Path, shard: int) -> Path:
    return folder / _COUNTS / f"{shard:05d}.json"


class PrepareFolder:
    """The output folder, locked by one command.

    Args:
        folder: made if it is not there.
        settings: of the command.

    Raises:
        DataError: another command writes it, it was begun with other settings, or it holds something else.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder, self._settings = folder, settings
        if folder.exists() and not folder.is_dir():
            raise DataError(f"--output {folder} is a file: name a folder")
        folder.mkdir(parents=True, exist_ok=True)
        lock: IO[str] | None = lock_file(folder / _LOCK)
        if lock is None:
            raise DataError(f"--output {folder} is being written by another command: wait until it has ended")
        self._lock = lock
        try:
            self._begin()
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        (self._folder / _LOCK).unlink(missing_ok=True)
        self._lock.close()

    def _begin(self) -> None:
        """Compare the settings with those that shards were made with, or write them where there are no shards."""
        for name in (MANIFEST, _SETTINGS):
            path = self._folder / name
            if path.exists() and (name == MANIFEST or any((self._folder / _COUNTS).glob("*.json"))):
                self._check_settings(_read_json(path).get("settings"))
                return
        own = {_LOCK, _SETTINGS, f"{_SETTINGS}.partial", _COUNTS, SKIPPED}
        files = [file for file in self._folder.iterdir() if file.name not in own]
        if (
            self._folder / _SETTINGS
        ).exists():  # a command that was ended before its first shard was complete
            for file in [file for file in files if _OF_A_SHARD.fullmatch(file.name)]:
                file.unlink()
                files.remove(file)
        if others := sorted(file.name for file in files):
            raise DataError(
                f"--output {self._folder} holds other files, such as {others[0]}: name a new folder, or empty this one"
            )
        (self._folder / _COUNTS).mkdir(exist_ok=True)
        write_json(self._folder / _SETTINGS, {"settings": self._settings})

    def _check_settings(self, there: object) -> None:
        if not isinstance(there, dict):
            raise DataError(
                f"{self._folder / MANIFEST} is damaged: remove {self._folder} and prepare it again"
            )
        for name in sorted({*there, *self._settings}):
            old, new = there.get(name), self._settings.get(name)
            if old != new:
                flag, values = f"--{name.replace('_', '-')}", f" ({old!r}, now {new!r})"
                if name.endswith(" files"):
                    flag, values = "--source", f" (names or sizes of its {name})"
                raise DataError(
                    f"--output {self._folder} was begun with another {flag}{values}: use the same again, or name a new "
                    "folder"
                )

    def has(self, shard: int) -> bool:
        """Whether a shard is complete; one whose parquet file has gone since is to be made again."""
        path = _counts_path(self._folder, shard)
        if not path.exists():
            return False
        if _read_json(path)["rows"] and not shard_path(self._folder, shard).exists():
            path.unlink()
            return False
        return True

    def finished(self) -> PreparedData | None:
        """What the manifest says; None if there is none yet.

        Raises:
            DataError: a shard that it names has gone.
        """
        path = self._folder / MANIFEST
        if not path.exists():
            return None
        content = _read_json(path)
        try:
            found = PreparedData(**content, new=False)
        except TypeError as error:
            raise DataError(f"{path} is damaged ({error}): remove the folder and prepare it again") from error
        gone = [name for name in found.shards if not (self._folder / name).exists()]
        if gone:
            raise DataError(
                f"{path} names {gone[0]}, which is not there: copy it again, or remove the folder and prepare it again"
            )
        self._clean()
        return found

    def finish(self, files_left_out: list[str], dead_links: int) -> PreparedData:
        """Add up the counts, and write skipped.jsonl and the manifest.

        Args:
            files_left_out, dead_links: see `PreparedData`.

        Raises:
            DataError: no row was kept.
        """
        total, shards = ShardCounts(), {}
        first: dict[str, list[dict[str, Any]]] = {}
        partial = self._folder / f"{SKIPPED}.partial"
        with partial.open("w", encoding="utf-8") as stream:
            for path in sorted((self._folder / _COUNTS).glob("*.json"), key=lambda path: int(path.stem)):
                counts = _read_json(path)
                if counts["rows"]:
                    shards[f"{path.stem}.parquet"] = counts["rows"]
                for name in ("rows_read", "rows", "images", "images_missing"):
                    setattr(total, name, getattr(total, name) + counts[name])
                for name in ("changes", "licenses", "skipped"):
                    getattr(total, name).update(counts[name])
                for row in counts["skipped_rows"]:
                    stream.write(json.dumps(row) + "\n")
                    some = first.setdefault(row["reason"], [])
                    if len(some) < _FIRST_SKIPPED:
                        some.append(row)
        partial.replace(self._folder / SKIPPED)
        found = PreparedData(
            settings=self._settings,
            shards=shards,
            rows_read=total.rows_read,
            rows=total.rows,
            images=total.images,
            images_missing=total.images_missing,
            changes=dict(total.changes),
            licenses=largest_licenses(total.licenses),
            skipped=dict(total.skipped.most_common()),
            skipped_first=first,
            files_left_out=files_left_out,
            dead_links=dead_links,
        )
        if not found.rows:
            raise _nothing_kept(found, self._folder)
        content = asdict(found)
        del content["new"]
        write_json(self._folder / MANIFEST, content)
        self._clean()
        return found

    def _clean(self) -> None:
        """Remove what only an unfinished folder needs."""
        (self._folder / _SETTINGS).unlink(missing_ok=True)
        shutil.rmtree(self._folder / _COUNTS, ignore_errors=True)
        for partial in self._folder.glob("*.partial"):  # of a process that was killed
            partial.unlink()


def _nothing_kept(data: PreparedData, folder: Path) -> DataError:
    if not data.rows_read:
        return DataError("the download has no rows: download it again")
    name, count = next(iter(data.skipped.items()))
    reason = PREPARING_REASONS[name]
    return DataError(
        f"none of the {data.rows_read:,} rows can be kept; {count:,} of them because {name}: {reason.what}; to do: "
        f"{reason.remedy}; rows are listed in {folder / SKIPPED}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): remove its folder and prepare it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: remove its folder and prepare it again")
    return content
