"""Rules for pictures: their size, their aspect ratio, and the bars that img2dataset adds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_eve.data.errors import SkipRow

PUBLISHED_MIN_SIDE = 449
"""EVE kept pictures of more than 448 pixels in width and height."""
_LEAST_BAR = 1 / 32  # of the side; a smaller one may be a frame of the picture itself
_SAME_COLOUR = 16  # steps of 255 from the colour of the bar, beside which JPEG leaves ripples
_UNEVEN = 16  # pixels that the two bars may differ in, for a JPEG block that holds the edge of one


@dataclass(frozen=True)
class PictureRules:
    """Which pictures are kept.

    Attributes:
        min_side: least width and height in pixels, of the picture as it is decoded.
        max_aspect: largest ratio of the longer side to the shorter one; None for any.
    """

    min_side: int = PUBLISHED_MIN_SIDE
    max_aspect: float | None = None

    def check(self, picture: Image.Image) -> None:
        """Check a picture.

        Args:
            picture: RGB, decoded and upright.

        Raises:
            SkipRow: it breaks a rule, with the reason (`reasons.py`) of the first that it breaks.
        """
        width, height = picture.size
        if bars := padding(np.asarray(picture)):
            raise SkipRow("padded", f"{width} x {height} pixels, of which bars take {bars[0]} and {bars[1]}")
        if min(width, height) < self.min_side:
            raise SkipRow("too_small", f"{width} x {height} pixels")
        if self.max_aspect is not None and max(width, height) > self.max_aspect * min(width, height):
            raise SkipRow("aspect_ratio", f"{width} x {height} pixels")


def padding(pixels: NDArray[np.uint8]) -> tuple[int, int] | None:
    """The bars of a picture that was padded to a square with one colour.

    img2dataset shrinks the longer side and centres the picture on white. So the bars lie on two opposite sides, have
    one colour and the same width, and the picture between them reaches its other two sides.

    Args:
        pixels: uint8 [H, W, 3].

    Returns:
        The widths of the two bars in pixels, above and below or left and right; None where there are none.
    """
    height, width, _ = pixels.shape
    if height != width:
        return None
    for lines in (pixels, pixels.swapaxes(0, 1)):
        first, last = _bar(lines), _bar(lines[::-1])
        if not (height * _LEAST_BAR <= min(first, last) and abs(first - last) <= _UNEVEN):
            continue
        if first + last >= height or _distance(lines[0, 0], lines[-1, 0]) > _SAME_COLOUR:
            continue
        # A picture whose ground has this colour all around was not padded, or it cannot be told.
        inside = lines[first : height - last].swapaxes(0, 1)
        if max(_distance(inside[0], lines[0, 0]), _distance(inside[-1], lines[0, 0])) > _SAME_COLOUR:
            return first, last
    return None


def _bar(lines: NDArray[np.uint8]) -> int:
    """Number of lines, from the first on, that have the colour of the first pixel."""
    colour = lines[0, 0].astype(np.int16)
    for number, line in enumerate(lines):
        if np.abs(line - colour).max() > _SAME_COLOUR:
            return number
    return len(lines)


def _distance(pixels: NDArray[np.uint8], colour: NDArray[np.uint8]) -> int:
    """Largest difference of pixels from a colour, in one channel."""
    return int(np.abs(pixels.astype(np.int16) - colour).max())
