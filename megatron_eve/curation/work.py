"""`Work`, the folder of one curation: the list of shards, and the tables that the stages make of each shard.

WORK/inputs.json            the shards, in the order given
WORK/STAGE/stage.json       settings of the stage, and what it was made from
WORK/STAGE/00000.parquet    its table for shard 0 (or .npy): a column `row`, the number of the row in the shard
WORK/STAGE/logs/            completions, statistics and logs, as datatrove writes them
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import parquet

from megatron_eve.checkpoint.files import sync_to_disk
from megatron_eve.curation.inputs import Inputs
from megatron_eve.curation.stage_names import STAGES
from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.schema import Record
from megatron_eve.data.sources.parquet import ParquetSource
from megatron_eve.data.sources.row_groups import UNREADABLE, one_line

STAGE_FILE = "stage.json"
EMPTY = ".empty"
"""Suffix behind the name of a file that would have no rows, and that readers refuse without: an empty file instead."""
# The table of this stage lists the rows that are left. Those of the others give rows that are dropped a `reason`.
_LISTS_KEPT_ROWS = "select"
_GIVE_REASONS = ("filter", "duplicates", "caption")


@dataclass(frozen=True)
class Work:
    """An opened work folder.

    Attributes:
        folder: its path.
        inputs: the shards.
    """

    folder: Path
    inputs: Inputs

    @classmethod
    def open(cls, folder: Path) -> Work:
        """Open a work folder in which a curation has begun.

        Raises:
            DataError: it has no list of shards, or a damaged one.
        """
        inputs = Inputs.read(folder)
        if inputs is None:
            raise DataError(
                f"{folder} holds no curation: begin with tools/curate.py filter --work {folder} --input SHARDS"
            )
        return cls(folder, inputs)

    def stage_folder(self, stage: str) -> Path:
        """The folder of a stage."""
        return self.folder / stage

    def table(self, stage: str, shard: int, suffix: str = ".parquet") -> Path:
        """The file of a stage for a shard."""
        return self.stage_folder(stage) / f"{shard:05d}{suffix}"

    def has(self, stage: str) -> bool:
        """Whether a stage has been begun here."""
        return (self.stage_folder(stage) / STAGE_FILE).exists()

    @contextmanager
    def output(self, stage: str, shard: int, suffix: str = ".parquet") -> Iterator[Path]:
        """Write the file of a stage for a shard: yields a temporary path, renamed when the block ends without error."""
        with self.output_file(stage, f"{shard:05d}{suffix}") as path:
            yield path

    @contextmanager
    def output_file(self, stage: str, name: str) -> Iterator[Path]:
        """The same for a file of a stage as a whole, such as "centres.npy"."""
        path = self.stage_folder(stage) / name
        # The suffix stays the last part: numpy adds .npy to names that have another.
        partial = path.with_name(f".partial-{name}")
        try:
            yield partial
            sync_to_disk(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def write_empty(self, stage: str, shard: int, suffix: str = ".parquet") -> None:
        """Write the mark of a file without rows, in the place of the file."""
        with self.output(stage, shard, suffix + EMPTY) as path:
            path.touch()

    def write_table(self, stage: str, shard: int, table: pyarrow.Table) -> None:
        """Write the table of a stage for a shard."""
        with self.output(stage, shard) as path:
            parquet.write_table(table, path, compression="zstd")

    def read_table(self, stage: str, shard: int, columns: Sequence[str] | None = None) -> pyarrow.Table:
        """The table of a stage for a shard.

        Args:
            stage, shard: whose.
            columns: that are read; None for all.

        Raises:
            DataError: it is missing or damaged.
        """
        path = self.table(stage, shard)
        try:
            with parquet.ParquetFile(path) as file:
                found = file.read(columns=None if columns is None else list(columns))
        except UNREADABLE as error:
            raise self.damaged(stage, path.name, error) from error
        missing = sorted(set(columns or ()) - set(found.column_names))
        if missing:
            raise self.damaged(stage, path.name, f"no column {', '.join(missing)}")
        return found

    def read_array(self, stage: str, name: str) -> NDArray[np.generic]:
        """An array of a stage by its file's name, such as "00000.npy"; it is mapped, not read.

        Raises:
            DataError: it is missing or damaged.
        """
        path = self.stage_folder(stage) / name
        try:
            return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise self.damaged(stage, name, error) from error

    def damaged(self, stage: str, name: str, error: object) -> DataError:
        """The error about a file of a stage that cannot be read."""
        path = self.stage_folder(stage) / name
        return DataError(
            f"{path} is missing or damaged ({one_line(error)}): delete it and run tools/curate.py {stage} again"
        )

    def kept_rows(self, shard: int, before: str) -> NDArray[np.int64]:
        """Numbers of the rows of a shard that the finished stages before `before` have left, ascending, int64 [kept].

        Raises:
            DataError: a table is missing, damaged, or of another shard.
        """
        kept = np.ones(self.inputs.rows[shard], dtype=bool)
        for stage in STAGES[: STAGES.index(before)]:
            if not self.has(stage):
                continue
            if stage in _GIVE_REASONS:
                table = self.read_table(stage, shard, ("row", "reason"))
                kept[self._rows(stage, shard, table.filter(table["reason"].is_valid()))] = False
            elif stage == _LISTS_KEPT_ROWS:
                listed = np.zeros_like(kept)
                listed[self._rows(stage, shard, self.read_table(stage, shard, ("row",)))] = True
                kept &= listed
        return np.flatnonzero(kept).astype(np.int64)

    def _rows(self, stage: str, shard: int, table: pyarrow.Table) -> NDArray[np.int64]:
        rows = table["row"].to_numpy().astype(np.int64)
        count = self.inputs.rows[shard]
        if len(rows) and (rows.min() < 0 or rows.max() >= count):
            raise self.damaged(
                stage, self.table(stage, shard).name, f"a row beyond the {count} of shard {shard}"
            )
        return rows

    def records(
        self, shard: int, rows: NDArray[np.int64] | None = None
    ) -> Iterator[tuple[int, Record | SkipRow]]:
        """Rows of a shard with their images, one after the other in constant memory.

        Args:
            shard: number of the shard.
            rows: numbers of the rows, ascending; None for all.

        Yields:
            The number of a row and its record, or the SkipRow that says why it cannot be read.

        Raises:
            DataError: the file is not the one that inputs.json lists, or cannot be read further.
        """
        self.inputs.check(shard)
        source = ParquetSource([self.inputs.files[shard]])
        wanted = None if rows is None else set(map(int, rows))
        for number, raw in enumerate(source.rows()):
            if wanted is not None and number not in wanted:
                continue
            try:
                yield number, source.record(raw)
            except SkipRow as skip:
                yield number, skip
