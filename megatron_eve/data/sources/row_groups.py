"""`RowGroupReader`, which reads single rows of a parquet row group, in the worker that parses them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import pyarrow
from pyarrow import parquet

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.sources.source import CHUNK_ROWS

# Errors of pyarrow for a damaged file; column names that are not UTF-8 raise UnicodeDecodeError.
UNREADABLE = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
_BATCH_BYTES = 16 << 20  # of a file that are in memory at a time


def open_file(file: str) -> parquet.ParquetFile:
    """Open a parquet file for reading rows through a small buffer."""
    return parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)


class RowGroupReader:
    """Reads the rows of one row group in order, a few at a time, so memory does not grow with the group or the file.

    Each worker that has rows of a group decodes the group up to its last row, and converts only its own rows to Python
    objects. This costs workers little, while sending images through the parent would be its largest cost.

    Args:
        opened: the file; it is not closed, since its other groups use it, too.
        group: number of the row group.
        columns: names of the columns to read.

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
        # The last two batches: a chunk of rows may span both, and may be read again.
        self._unpacked: deque[tuple[int, list[dict[str, Any] | SkipRow]]] = deque(maxlen=2)

    def holds(self, group: int, row: int) -> bool:
        """Whether `row` can return this row: it is in this group, and not before the batches in memory."""
        first = self._unpacked[0][0] if self._unpacked else self._next
        return group == self._group and row >= first

    def row(self, number: int) -> dict[str, Any]:
        """Column values of one row.

        Raises:
            SkipRow: a value cannot be converted to a Python object.
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
    """The first 160 characters of an error message, without line breaks."""
    return " ".join(str(error).split())[:160]


def _unpack(batch: pyarrow.RecordBatch) -> list[dict[str, Any] | SkipRow]:
    """Column values of each row, or the SkipRow of a row that cannot be converted."""
    try:
        return list(batch.to_pylist())
    except (
        ValueError,
        OverflowError,
    ):  # some value cannot be converted: text that is not UTF-8, a date out of range
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
