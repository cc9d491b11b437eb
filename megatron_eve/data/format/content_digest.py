"""The digest of a dataset's content: the writer makes it, and a check of the dataset makes it again.

It covers every token id and label, the recorded size of every picture, and the first and last 4,096 bytes of every
picture's file. The bytes in between are not in it: hashing them all would take as long as writing them.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HASHED_END = 4096  # bytes at each end of an image file: they tell it from another


def digest_input_of_image(width: int, height: int, data: bytes) -> bytes:
    """What is hashed of one image: its recorded size in pixels and the ends of its file."""
    return b"%d %d %d " % (width, height, len(data)) + data[:_HASHED_END] + data[-_HASHED_END:]


def digest_input_of_text(tokens: NDArray[Any], labels: NDArray[Any]) -> bytes:
    """What is hashed of one sample's text: n token ids and n labels."""
    return b"%d " % len(tokens) + np.concatenate([tokens, labels]).astype(np.int32).tobytes()


class ContentDigest:
    """SHA-256 of samples in their order: of each sample its images, then its text."""

    def __init__(self) -> None:
        self._content = hashlib.sha256()

    def add(self, digest_input: bytes) -> None:
        """Add what the functions above give of images and texts."""
        self._content.update(digest_input)

    def hexdigest(self) -> str:
        """The digest of what was added so far, in hexadecimal."""
        return self._content.hexdigest()
