"""Pictures to the squares of which codes are made: the published bytes, by Pillow. Needs no torch."""

from __future__ import annotations

import numpy as np
from PIL import Image

from megatron_eve.data.images.patches import view_of
from megatron_eve.data.images.resizing import Pixels
from megatron_eve.models.family import View

AUTO = "auto"
"""The fit of each picture as the dataset marks it: square where it is to be drawn, stretch where it is read."""
FITS = ("stretch", "square")
"""How a picture becomes a square.

- stretch: resized, its aspect ratio lost: a picture that is read.
- square: its largest square is cut out first: the middle of a wide picture, the top of a tall one. A picture that is to
  be drawn.
"""


def square_of(image: Image.Image, fit: str, size: int) -> Pixels:
    """An upright RGB picture as a square: uint8 [size, size, 3].

    Args:
        image: the picture.
        fit: one of `FITS`.
        size: side of the square in pixels.
    """
    if fit == "square":
        side = min(image.size)
        left = (image.width - side) // 2
        image = image.crop((left, 0, left + side, side))
    return view_of(image, View(size, size, (0, 0, 0), pass_order="pillow13"))


def placeholder_square(colour: tuple[int, int, int], size: int) -> Pixels:
    """What replaces a picture that does not decode, all of one colour: uint8 [size, size, 3]."""
    return np.full((size, size, 3), colour, dtype=np.uint8)
