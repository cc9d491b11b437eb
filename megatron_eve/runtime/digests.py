"""The sha256 of a file: it identifies weights and tokenizers, and detects damage."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from pathlib import Path

_PIECE = 16 << 20  # bytes read at a time


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    pieces = file_digest_in_pieces(path)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return str(end.value)


def file_digest_in_pieces(path: Path) -> Generator[int, None, str]:
    """Like `file_digest`, as a generator: yields the number of bytes after each piece, and returns the digest."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
            yield len(piece)
    return digest.hexdigest()
