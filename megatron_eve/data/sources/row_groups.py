"""Rows of a parquet file, read by the worker that they are sent to."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import pyarrow
from pyarrow import parquet

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.sources.source import CHUNK_ROWS

# What pyarrow raises of a damaged file; names of columns that are no text come as the last one.
UNREADABLE = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
_BATCH_BYTES = 16 << 20  # of a file that are held at a time


def open_file(file: str) -> parquet.ParquetFile:
    """A file of which rows are read through a small buffer."""
    return parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)


class RowGroupReader:
    """Reads the rows of one row group forwards, a few at a time: neither file nor group is held, however large.

    Each worker that has rows of a group decodes it up to its last one of them, and makes Python's objects of its own
    rows. That costs workers little, where pictures that pass through the parent cost it more than all else.

    Args:
        opened: the file; it stays open for its other groups.
        group: number of the row group.
        columns: that are read.

    Raises:
        pyarrow.ArrowException, OSError, UnicodeDecodeError: the file is damaged; also while reading.
    """

    def __init__(self, opened: parquet.ParquetFile, group: int, columns: Sequence[str]) -> None:
        self._group = group
        metadata = opened.metadata.row_group(group)
        count = max(1, min(CHUNK_ROWS, _BATCH_BYTES * metadata.num_rows // max(metadata.total_byte_size, 1)))
        self._batches = opened.iter_batches(
            count, row_groups=[group], columns=list(columns), use_threads=False
        )
        self._next = 0
        # The last two: a chunk of rows may lie in both, and may be gone through again.
        self._unpacked: deque[tuple[int, list[dict[str, Any] | SkipRow]]] = deque(maxlen=2)

    def holds(self, group: int, row: int) -> bool:
        """Whether `row` can give a row of a group: it is this group, and not passed already."""
        first = self._unpacked[0][0] if self._unpacked else self._next
        return group == self._group and row >= first

    def row(self, number: int) -> dict[str, Any]:
        """The columns of one row.

        Raises:
            SkipRow: one of them cannot be had in Python.
        """
        while number >= self._next:
            batch = next(self._batches, None)
            if batch is None:
                raise OSError(f"row group {self._group} has {self._next} rows, less than the file says")
            if number < self._next + batch.num_rows:
                self._unpacked.append((self._next, _unpack(batch)))
            self._next += batch.num_rows
        for first, rows in self._unpacked:
            if first <= number < first + len(rows):
                found = rows[number - first]
                if isinstance(found, SkipRow):
                    raise found
                return found
        raise AssertionError(f"row {number} of row group {self._group} was passed")


def one_line(error: object) -> str:
    """The beginning of an error's text, without its line breaks."""
    return " ".join(str(error).split())[:160]


def _unpack(batch: pyarrow.RecordBatch) -> list[dict[str, Any] | SkipRow]:
    """The columns of each row, or why they cannot be had."""
    try:
        return list(batch.to_pylist())
    except (
        ValueError,
        OverflowError,
    ):  # one value of one row: text that is not UTF-8, a date that Python has not
        return [_row_at(batch, number) for number in range(batch.num_rows)]


def _row_at(batch: pyarrow.RecordBatch, number: int) -> dict[str, Any] | SkipRow:
    fields = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            fields[name] = column[number].as_py()
        except UnicodeDecodeError as error:
            return SkipRow("text_not_unicode", f"{name}: {error.reason} at byte {error.start}")
        except (ValueError, OverflowError) as error:
            return SkipRow("parquet_row", f"{name}: {one_line(error)}")
    return fields
