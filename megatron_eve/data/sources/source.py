"""`Source`, the base class of input readers: one process splits files into rows, workers parse them.

`rows` runs in the parent process, which has to keep all workers busy: it only finds where rows begin and end.
`record` parses a row, in a worker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import Record

CHUNK_ROWS = 16
"""Number of rows that are sent to a worker at a time."""


class RawRow(NamedTuple):
    """One row of an input file, not parsed yet.

    Attributes:
        file: name of the file of the input.
        number: of the row in the file, counted from 1.
        payload: input of `Source.record`; cheap to send to another process.
        problem: (reason, detail) if the row is already known to be unusable.
    """

    file: str
    number: int
    payload: Any
    problem: tuple[str, str] | None = None


class Source(ABC):
    """Reader for one layout of input files. Each worker gets a copy.

    Args:
        files: input files, in order.
        image_root: folder that image names are relative to, if the layout has names.
    """

    def __init__(self, files: Sequence[Path], image_root: str | None = None) -> None:
        self._files = [Path(file) for file in files]
        self._image_root = image_root
        self._position = 0

    @property
    def num_bytes(self) -> int:
        """Total size of all files in bytes, for the progress bar."""
        return sum(file.stat().st_size for file in self._files)

    @property
    def position(self) -> int:
        """Bytes read so far; a source may have read ahead of the last row."""
        return self._position

    @abstractmethod
    def rows(self) -> Iterator[RawRow]:
        """All rows in order, file after file, in constant memory.

        Raises:
            DataError: a file cannot be opened or read further; the message names the file, the row and the remedy.
        """

    def record(self, row: RawRow) -> Record:
        """Parse a row.

        Raises:
            SkipRow: the row cannot be used.
        """
        if row.problem is not None:
            raise SkipRow(*row.problem)
        return self._make_record(row)

    @abstractmethod
    def _make_record(self, row: RawRow) -> Record:
        """Parse a row that has no `problem`; raises SkipRow as `record` does."""
