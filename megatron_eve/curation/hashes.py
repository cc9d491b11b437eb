"""Two hashes of a picture: SHA-256 of its file, and 64 bits of what it looks like.

The perceptual hash is `imagehash.phash`: the picture in grey, scaled to 32 x 32, its 8 x 8 lowest coefficients of a
discrete cosine transform, one bit for each that lies above their median. Encoding a picture again and scaling it change
few or none of the bits; the distance of two hashes is the number of bits that differ.
"""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

HASH_BITS = 64
"""Bits of a perceptual hash."""


def sha256_of(data: bytes) -> bytes:
    """The 32 bytes of the SHA-256 of a file's bytes."""
    return hashlib.sha256(data).digest()


def perceptual_hash(image: Image.Image) -> int:
    """64 bits of what a picture looks like; the first coefficient of the transform is the highest bit.

    Args:
        image: the decoded picture, upright, of any mode and size.

    Returns:
        From 0 to 2**64 - 1, the number that `str(imagehash.phash(image))` writes in hexadecimal. A picture of one
        colour gives 0 (black) or 2**63 (any other).

    Raises:
        ImportError: imagehash is not installed.
    """
    import imagehash

    bits = imagehash.phash(image).hash  # (8, 8) bool
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
