"""The digest of a dataset's content: the writer makes it, and a check of the dataset makes it again.

It covers every token id and label, the recorded size of every picture, and the first and last 4,096 bytes of every
picture's file. The bytes in between are not in it: hashing them all would take as long as writing them.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_HASHED_END = 4096  # bytes at each end of an image file: they tell it from another


class ContentDigest:
    """SHA-256 of samples in their order: of each sample its images, then its text."""

    def __init__(self) -> None:
        self._content = hashlib.sha256()

    def add_image(self, width: int, height: int, data: bytes) -> None:
        """Add one image: its recorded size in pixels and its file."""
        ends = data[:_HASHED_END] + data[-_HASHED_END:]
        self._content.update(b"%d %d %d " % (width, height, len(data)) + ends)

    def add_text(self, tokens: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        """Add one sample's text: n token ids and n labels."""
        text = np.concatenate([tokens, labels]).astype(np.int32)
        self._content.update(b"%d " % len(tokens) + text.tobytes())

    def hexdigest(self) -> str:
        """The digest of what was added so far, in hexadecimal."""
        return self._content.hexdigest()
