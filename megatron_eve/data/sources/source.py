"""What every source is: it cuts its files into rows in one process, and reads a row in another.

`rows` runs in the parent of the workers, which has to keep all of them busy: it finds where rows begin and end, and
leaves their content alone. `record` runs in a worker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import Record

CHUNK_ROWS = 16
"""Rows that are sent to a worker at a time."""


class RawRow(NamedTuple):
    """One row as it was cut out of its file.

    Attributes:
        file: name of the file of the input.
        number: of the row in it, counted from 1.
        payload: what `Source.record` makes a record of; cheap to send to another process.
        problem: (reason, detail) of a row that is known to be unusable already.
    """

    file: str
    number: int
    payload: Any
    problem: tuple[str, str] | None = None


class Source(ABC):
    """Rows of one layout from one or more files. A copy of it goes to each worker.

    Args:
        files: of the input, in their order.
        image_root: the folder that picture names are relative to, where the layout has names.
    """

    def __init__(self, files: Sequence[Path], image_root: str | None = None) -> None:
        self._files = [Path(file) for file in files]
        self._image_root = image_root
        self._position = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all files, for a progress bar."""
        return sum(file.stat().st_size for file in self._files)

    @property
    def position(self) -> int:
        """Bytes read so far; a source may read a buffer ahead of the last row."""
        return self._position

    @abstractmethod
    def rows(self) -> Iterator[RawRow]:
        """All rows in their order, file after file, in constant memory.

        Raises:
            DataError: a file cannot be opened, or not be read on; it names the file, the row and the remedy.
        """

    def record(self, row: RawRow) -> Record:
        """What a row holds.

        Raises:
            SkipRow: the row cannot be used.
        """
        if row.problem is not None:
            raise SkipRow(*row.problem)
        return self._make_record(row)

    @abstractmethod
    def _make_record(self, row: RawRow) -> Record:
        """What a row without a problem holds; raises SkipRow as `record`."""
