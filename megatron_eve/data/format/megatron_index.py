"""Megatron's .idx file beside a .bin: written without megatron-core, and checked without loading it.

megatron-core's `IndexedDatasetBuilder` writes the same bytes (a test compares them), and keeps 12 bytes a row in
memory; importing it takes seconds, in each task of a Slurm array.

    9 bytes  magic            8 bytes   version 1 (uint64)      1 byte  code of the .bin's dtype
    8 bytes  sequences n      8 bytes   documents + 1           4 n     lengths (int32)
    8 n      offsets in the .bin (int64)                        8 (documents + 1)  document bounds (int64)
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.errors import AGAIN, DataError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_DTYPES = {1: np.dtype(np.uint8), 4: np.dtype(np.int32)}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_ROWS_AT_A_TIME = 1 << 16


class IndexWriter:
    """Writes a .idx with constant memory; all rows form one document, since nothing reads document bounds.

    Args:
        path: temporary path of the file.
        dtype: what the .bin holds.
    """

    def __init__(self, path: str, dtype: np.dtype[Any]) -> None:
        self.rows = 0
        self._dtype = dtype
        self._file: IO[bytes] = open(path, "w+b")  # noqa: SIM115 (closed by close or discard)
        self._write_header()

    def add(self, lengths: NDArray[np.int32]) -> None:
        """Append rows by their lengths: int32 [n], values of `dtype`."""
        self._file.write(lengths.astype("<i4").tobytes())
        self.rows += len(lengths)

    def close(self) -> None:
        """Write offsets and bounds behind the lengths, and the counts into the header."""
        offset = 0
        for start in range(0, self.rows, _ROWS_AT_A_TIME):
            count = min(_ROWS_AT_A_TIME, self.rows - start)
            self._file.seek(_HEADER.size + 4 * start)
            sizes = (
                np.frombuffer(self._file.read(4 * count), dtype="<i4").astype("<i8") * self._dtype.itemsize
            )
            ends = offset + np.cumsum(sizes)
            self._file.seek(0, os.SEEK_END)
            self._file.write((ends - sizes).tobytes())
            offset = int(ends[-1])
        self._file.seek(0, os.SEEK_END)
        self._file.write(np.array([0, self.rows], dtype="<i8").tobytes())
        self._write_header()
        self._file.close()

    def discard(self) -> None:
        """Close the file without finishing it."""
        self._file.close()

    def _write_header(self) -> None:
        self._file.seek(0)
        self._file.write(_HEADER.pack(_MAGIC, _VERSION, _CODES[self._dtype], self.rows, 2))


def check_index(prefix: str, dtype: np.dtype[Any], rows: int, num_bytes: int) -> None:
    """Check a Megatron .idx/.bin pair against the manifest without loading either.

    megatron-core itself asserts, reads past the end, or returns nonsense on such files.

    Args:
        prefix: of the pair, such as OUT_text.
        dtype: what the .bin holds.
        rows, num_bytes: sequences in the .idx and size of the .bin, from the manifest.

    Raises:
        DataError: a file is missing, of another version or type, or of another size than the manifest says.
    """
    index, data = Path(prefix + ".idx"), Path(prefix + ".bin")
    for path in (index, data):
        if not path.is_file():
            raise DataError(f"{path} is missing: {AGAIN}")
    with index.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise DataError(f"{index} is truncated ({len(header)} bytes, less than its header): {AGAIN}")
    magic, version, code, sequences, documents = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise DataError(f"{index} is not a Megatron index file: {AGAIN}")
    if version != _VERSION:
        raise DataError(f"{index} is of version {version}, and version {_VERSION} can be read: {AGAIN}")
    if _DTYPES.get(code) != dtype:
        raise DataError(f"{index} is for data of type code {code}, not {dtype}: {AGAIN}")
    if sequences != rows:
        raise DataError(f"{index} has {sequences} rows where the manifest says {rows}: {AGAIN}")
    for path, expected in ((index, len(header) + 12 * sequences + 8 * documents), (data, num_bytes)):
        found = path.stat().st_size
        if found != expected:
            kind = "truncated" if found < expected else "too long"
            raise DataError(f"{path} is {kind} ({found} bytes where {expected} are due): {AGAIN}")
    with index.open("rb") as stream:
        stream.seek(-8, os.SEEK_END)
        (last,) = struct.unpack("<q", stream.read(8))
    if not documents or last != rows:
        raise DataError(f"{index} is damaged (its last document ends at row {last} of {rows}): {AGAIN}")
