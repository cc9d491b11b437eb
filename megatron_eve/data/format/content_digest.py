"""The digest of a dataset's content. The writer records it, and a check of the dataset recomputes it.

It covers every token id and label, the recorded size of every picture, and the first and last 4,096 bytes of every
picture's file. The bytes in between are not covered: hashing all of them would take as long as writing them.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HASHED_END = 4096  # bytes that are hashed at each end of an image file


def digest_input_of_image(width: int, height: int, data: bytes) -> bytes:
    """The bytes that are hashed for one image: its recorded size in pixels and both ends of its file."""
    return b"%d %d %d " % (width, height, len(data)) + data[:_HASHED_END] + data[-_HASHED_END:]


def digest_input_of_text(tokens: NDArray[Any], labels: NDArray[Any]) -> bytes:
    """The bytes that are hashed for one sample's text: n token ids and n labels."""
    return b"%d " % len(tokens) + np.concatenate([tokens, labels]).astype(np.int32).tobytes()


class ContentDigest:
    """SHA-256 of samples in order: for each sample its images, then its text."""

    def __init__(self) -> None:
        self._content = hashlib.sha256()

    def add(self, digest_input: bytes) -> None:
        """Add bytes from `digest_input_of_image` or `digest_input_of_text`."""
        self._content.update(digest_input)

    def hexdigest(self) -> str:
        """The digest of all bytes added so far, in hexadecimal."""
        return self._content.hexdigest()
