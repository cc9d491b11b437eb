"""`JsonReader`, which splits a JSON array or a JSON lines file into the texts of its rows, in constant memory.

Array elements and lines are parsed by the same function (`sources/fields.py`), so both forms give the same values,
and the same reasons for broken rows.
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
_SPACE = b" \t\r\n"  # white space that JSON allows between values
_CHUNK = 1 << 16
# Limit for one row in bytes: with a missing quote or bracket, the rest of the file would be read as one row.
_MAX_TEXT = 1 << 28
# These skip complete strings and all other bytes up to the next structural byte, inside an element and between
# elements. They stop at a quote only if its string continues after the buffer.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_INSIDE = re.compile(rb'(?:[^"{}\[\]]++|' + _STRING + rb")*+", re.DOTALL)
_BETWEEN = re.compile(rb'(?:[^"{}\[\],]++|' + _STRING + rb")*+", re.DOTALL)
_CLOSERS = {b"{": b"}", b"[": b"]"}


class JsonReader:
    """Splits a JSON file into the texts of its rows. A context manager, which closes the file.

    A file whose name ends in .jsonl or .ndjson holds one JSON value a line. Any other file holds one JSON array. Blank
    lines and empty elements between two commas are skipped. The texts are not parsed here: a line or element that is
    not JSON is yielded, too.

    Args:
        path: of the file.

    Raises:
        DataError: in the constructor, the file cannot be opened; while iterating, the end of an array element cannot
            be found, the array is truncated, or a row is larger than 256 MiB. The message names the file and the row;
            the rest of the file cannot be read.
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
        """Bytes read so far, up to one buffer ahead of the last yielded row."""
        return self._stream.tell()

    def texts(self) -> Iterator[tuple[int, bytes]]:
        """Yield (number, text) of each row; numbers are array positions or line numbers, counted from 1."""
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
        """Number and text of each element of the array."""
        self._find_array()
        # The element begins at `start`; bytes before `at` are scanned.
        buffer, start, at, number = b"", 0, 0, 1
        closers: list[bytes] = []  # closing brackets expected for the open ones
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
        """Append more of the file to an incomplete element; its size doubles, so rescanning stays linear."""
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
