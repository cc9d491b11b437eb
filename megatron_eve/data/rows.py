"""Read the rows of a LLaVA-style file, a JSON array or JSON lines, one at a time and in constant memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import ijson

from megatron_eve.data.errors import DataError

LINE_SUFFIXES = (".jsonl", ".ndjson")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InputRow:
    """One row of the input.

    Attributes:
        number: counted from 1: the place in the array, or the line.
        value: what JSON holds there; None for a line that is not JSON.
        problem: why a line is not JSON.
    """

    number: int
    value: object
    problem: str | None = None


class RowReader:
    """Iterates over the rows of a file; as a context manager it closes it.

    A file whose name ends in .jsonl or .ndjson holds one JSON value a line (blank lines are passed over), and
    a broken line is a row with a `problem`. Any other file holds one JSON array.

    Args:
        path: the file.

    Raises:
        DataError: when made, the file cannot be opened; while iterating, a JSON array is broken or breaks
            off. The message names the file and the row. Nothing after that point can be trusted.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._stream: IO[bytes] = self.path.open("rb")
        except OSError as error:
            raise DataError(
                f"cannot open {path} ({error.strerror}): give --input a JSON or JSONL file"
            ) from error
        self.num_bytes = self.path.stat().st_size

    @property
    def position(self) -> int:
        """Bytes read so far, a buffer ahead of the row that was yielded last."""
        return self._stream.tell()

    def __iter__(self) -> Iterator[InputRow]:
        return self._lines() if self.path.suffix.lower() in LINE_SUFFIXES else self._array()

    def __enter__(self) -> RowReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def _lines(self) -> Iterator[InputRow]:
        for number, line in enumerate(self._stream, start=1):
            if not line.strip():
                continue
            try:
                yield InputRow(number, json.loads(line))
            except (ValueError, RecursionError) as error:
                yield InputRow(number, None, _one_line(error))

    def _array(self) -> Iterator[InputRow]:
        self._find_array()
        number = 0
        try:
            for number, value in enumerate(ijson.items(self._stream, "item", use_float=True), start=1):
                yield InputRow(number, value)
        except ijson.JSONError as error:
            raise DataError(
                f"{self.path}, row {number + 1}: broken JSON ({_one_line(error)}). An array cannot be read "
                "past this: repair the file, it may be a download that broke off"
            ) from error

    def _find_array(self) -> None:
        start = len(_BOM) if self._stream.read(len(_BOM)) == _BOM else 0
        self._stream.seek(start)
        byte = self._stream.read(1)
        while byte.isspace():
            byte = self._stream.read(1)
        if byte != b"[":
            raise DataError(
                f"{self.path}, row 1: a JSON array begins with '[', this begins with {byte!r}: "
                f"if it holds one object a line, give it the suffix {LINE_SUFFIXES[0]}"
            )
        self._stream.seek(start)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
