"""Cut a JSON array, or JSON lines, into the texts of its rows, one at a time and in constant memory.

The text of an element and a line are parsed alike (`sources/fields.py`): the same rows give the same values, and the
same reasons where they are broken, whichever way they are written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_eve.data.errors import DataError
from megatron_eve.runtime.errors import is_lfs_pointer

LINE_SUFFIXES = (".jsonl", ".ndjson")
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"  # what JSON allows between values
_CHUNK = 1 << 16
_MAX_TEXT = (
    1 << 28
)  # bytes of one row: where a quote or bracket is missing, the rest of the file would be read as one
# Whole strings and all else up to the next byte that matters, inside an element and between elements. A quote is such
# a byte only where its string goes on after the buffer.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_INSIDE = re.compile(rb'(?:[^"{}\[\]]++|' + _STRING + rb")*+", re.DOTALL)
_BETWEEN = re.compile(rb'(?:[^"{}\[\],]++|' + _STRING + rb")*+", re.DOTALL)
_CLOSERS = {b"{": b"}", b"[": b"]"}


class JsonReader:
    """Cuts a file into the texts of its rows; as a context manager it closes it.

    A file whose name ends in .jsonl or .ndjson holds one JSON value a line. Any other file holds one JSON array. Blank
    lines, and commas of an array with nothing between them, are passed over. A line or element that is not JSON is a
    row with a `problem`. As Python writes them, NaN, Infinity and halves of surrogate pairs are taken, and of equal
    keys the last one counts.

    Args:
        path: the file.

    Raises:
        DataError: when made, the file cannot be opened; while iterating, it is not clear where an element of an array
            ends, the array breaks off, or a row is larger than 256 MiB. The message names the file and the row.
            Nothing after that point can be trusted.
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
        if is_lfs_pointer(self._stream.read(64)):
            raise DataError(
                f"{path} is a git-lfs pointer, not the rows themselves: run git lfs pull in its folder"
            )
        self._stream.seek(0)

    @property
    def position(self) -> int:
        """Bytes read so far, a buffer ahead of the row that was yielded last."""
        return self._stream.tell()

    def texts(self) -> Iterator[tuple[int, bytes]]:
        """Number (from 1: the place in the array, or the line) and text of each row."""
        return self._lines() if self.path.suffix.lower() in LINE_SUFFIXES else self._elements()

    def __enter__(self) -> JsonReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Number and text of each line that is not blank."""
        number = 0
        while line := self._stream.readline(_MAX_TEXT + 1):
            number += 1
            self._check_size(len(line), number)
            if line.removeprefix(_BOM).strip(_SPACE):
                yield number, line

    def _elements(self) -> Iterator[tuple[int, bytes]]:
        """Place and text of each element of the array."""
        self._find_array()
        buffer, start, at, number = b"", 0, 0, 1  # the element begins at `start`, and is searched up to `at`
        closers: list[bytes] = []  # due for the brackets that are open
        while True:
            passed = (_INSIDE if closers else _BETWEEN).match(buffer, at)
            at = passed.end() if passed else at
            token = buffer[at : at + 1]
            if token in (b"", b'"'):
                buffer, start, at = self._longer(buffer[start:], number), 0, at - start
                continue
            at += 1
            if token in _CLOSERS:
                closers.append(_CLOSERS[token])
            elif token in b"}]" and (closers or token == b"}"):
                if not closers or closers.pop() != token:
                    raise self._broken(number, f"an unexpected {token.decode()}")
            elif token in b",]" and not closers:
                text = buffer[start : at - 1].strip(_SPACE)
                start = at
                if text:
                    yield number, text
                    number += 1
                if token == b"]":
                    break
        rest = buffer[at:]
        while rest:
            if rest.strip(_SPACE):
                raise self._broken(number, f"{rest.strip(_SPACE)[:20]!r} after the end of the array")
            rest = self._stream.read(_CHUNK)

    def _longer(self, text: bytes, number: int) -> bytes:
        """The text of an unfinished element with more of the file; twice as much each time, as it is searched again."""
        self._check_size(len(text), number)
        more = self._stream.read(max(_CHUNK, len(text)))
        if not more:
            raise self._broken(number, "the file ends before the array does")
        return text + more

    def _check_size(self, size: int, number: int) -> None:
        if size > _MAX_TEXT:
            raise self._broken(
                number, f"more than {_MAX_TEXT >> 20} MiB; a quote or a bracket may be missing"
            )

    def _broken(self, number: int, what: str) -> DataError:
        return DataError(
            f"{self.path}, row {number}: broken JSON ({what}). The file cannot be read past this: repair it, it may be "
            "a download that broke off"
        )

    def _find_array(self) -> None:
        start = len(_BOM) if self._stream.read(len(_BOM)) == _BOM else 0
        self._stream.seek(start)
        byte = self._stream.read(1)
        while byte and byte in _SPACE:
            byte = self._stream.read(1)
        if byte != b"[":
            raise DataError(
                f"{self.path}, row 1: a JSON array begins with '[', this begins with {byte!r}: "
                f"if it holds one object a line, give it the suffix {LINE_SUFFIXES[0]}; if the array is inside of an "
                "object, take it out"
            )
