"""Parquet files of the Hugging Face hub whose rows are not yet records: their columns, and single rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import parquet

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.schema import ImageFile
from megatron_eve.data.sources.row_groups import UNREADABLE, RowGroupReader, one_line, open_file


class Place(NamedTuple):
    """Where a row is.

    Attributes:
        file: name of the parquet file.
        group: number of the row group.
        row: number in the row group.
    """

    file: str
    group: int
    row: int


def check_columns(files: Sequence[Path], wanted: Sequence[str]) -> None:
    """Raise DataError unless all files are complete and have these columns."""
    for file in files:
        try:
            names = parquet.read_schema(file).names
        except UNREADABLE as error:
            raise _damaged(str(file), error) from error
        if missing := [name for name in wanted if name not in names]:
            raise DataError(
                f"{file} has no column {', '.join(missing)} (it has {one_line(', '.join(names))}): it is not the data "
                "set that the preparer reads"
            )


def places(file: Path) -> Iterator[Place]:
    """The rows of a file, in order."""
    try:
        metadata = parquet.read_metadata(file)
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    except UNREADABLE as error:
        raise _damaged(str(file), error) from error
    for group, count in enumerate(counts):
        for row in range(count):
            yield Place(str(file), group, row)


class ParquetTable:
    """Reads columns of single rows, fastest in their order. For one process.

    Args:
        columns: names of the columns.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = list(columns)
        self._opened: tuple[str, parquet.ParquetFile] | None = None
        self._group: RowGroupReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_columns": self._columns, "_opened": None, "_group": None}

    def row(self, place: Place) -> dict[str, Any]:
        """Columns of a row.

        Raises:
            SkipRow: a value cannot be read.
            DataError: the file is damaged.
        """
        try:
            if self._opened is None or self._opened[0] != place.file:
                self._opened, self._group = (place.file, open_file(place.file)), None
            if self._group is None or not self._group.holds(place.group, place.row):
                self._group = RowGroupReader(self._opened[1], place.group, self._columns)
            return self._group.row(place.row)
        except UNREADABLE as error:
            raise _damaged(place.file, error) from error


def image_of(value: object, name: str) -> ImageFile:
    """The picture of an image column, `{bytes, path}` or bytes.

    Args:
        value: of the column.
        name: of the picture, if the column has none.

    Raises:
        SkipRow: the column holds no bytes.
    """
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if not isinstance(data, bytes):
        raise SkipRow("parquet_row", f"the image of {name} is {type(data).__name__}, not bytes")
    return ImageFile(data=data, path=path if isinstance(path, str) and path else name)


def _damaged(file: str, error: Exception) -> DataError:
    return DataError(f"{file} is not a complete parquet file ({one_line(error)}): copy or download it again")
