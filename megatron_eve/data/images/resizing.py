"""Resize a picture with Pillow's bytes: to any size, or to a square by padding or cropping. Needs no torch.

Pillow resizes rows and columns in two passes and rounds to bytes between them. In each pass every row (or column) is by
itself, so parts of a picture can be resized apart: what is never looked at is not made.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_eve.models.family import View

Pixels = NDArray[np.uint8]

# Up to this many times as long as wide, a picture becomes a square with exactly Pillow's bytes. Time and memory of a
# longer one are bounded, and its bytes may be others.
LONGEST_SIDE_RATIO = 20
# Sides in pixels: a longer picture is halved, or so, before anything else; one that is taller than the second and than
# the ratio is padded with columns first.
_LONGEST = 1 << 16
_LONGEST_EXACT_TALL = 1 << 12
# Pixels of the rows that are padded and resized together.
_BLOCK_PIXELS = 1 << 22


def resize(image: Image.Image, width: int, height: int, columns_first: bool = False) -> Pixels:
    """`image` (RGB) resized as published, with Pillow's default filter: bicubic, antialiased.

    Rows first, then columns: every Pillow before 13 does so by itself, while 13 takes the columns first where that is
    less work, and rounds to other bytes.

    Args:
        image: of any size.
        width, height: in pixels.
        columns_first: columns first, then rows; see `columns_come_first`.

    Returns:
        uint8 [height, width, 3], writable and contiguous.
    """
    return np.array(_resized(image, width, height, columns_first), dtype=np.uint8)


def columns_come_first(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Does Pillow 13 resize the columns first? Found from its output, 13.0.0.

    Args:
        old, new: width and height in pixels, before and after.
    """
    return new[1] < old[1] and old[1] - new[1] > 2 * (old[0] - new[0])


def fitted(image: Image.Image, view: View) -> Pixels:
    """A picture resized as a view says: uint8 [view.height, view.width, 3], writable and contiguous."""
    as_pillow_13 = view.pass_order == "pillow13"
    new = (view.width, view.height)
    if view.fit == "pad":
        return np.array(_padded(_reduced(image), view.width, view.pad_colour), dtype=np.uint8)
    if view.fit == "crop":
        return np.array(_cropped(image, view.width, as_pillow_13), dtype=np.uint8)
    if as_pillow_13:
        image = _reduced(image)
    return resize(image, *new, as_pillow_13 and columns_come_first(image.size, new))


def enlarges(view: View, width: int, height: int) -> bool:
    """Is a view of a picture of `width` x `height` pixels larger than the picture, in either direction?"""
    if view.fit == "pad":
        return view.width > max(width, height)
    if view.fit == "crop":
        return view.width > min(width, height)
    return view.width > width or view.height > height


def crop_window(width: int, height: int, side: int) -> tuple[int, int, int, int]:
    """How a picture is resized and cropped to a square: transformers' `shortest_edge`, then `center_crop`.

    Returns:
        Width and height that it is resized to, whose shorter one is `side`, and the left and the upper edge of the
        square in that; in pixels.
    """
    longer = side * max(width, height) // min(width, height)
    new_width, new_height = (side, longer) if width <= height else (longer, side)
    return new_width, new_height, (new_width - side) // 2, (new_height - side) // 2


def _resized(image: Image.Image, width: int, height: int, columns_first: bool = False) -> Image.Image:
    between = (image.width, height) if columns_first else (width, image.height)
    return image.resize(between).resize((width, height))


def _reduced(image: Image.Image) -> Image.Image:
    """A picture of which a side is too long for Pillow's tables of weights (32 bytes a pixel of it), made smaller."""
    factor = -(-max(image.size) // _LONGEST)
    return image if factor == 1 else image.reduce((min(factor, image.width), min(factor, image.height)))


def _cropped(image: Image.Image, side: int, as_pillow_13: bool) -> Image.Image:
    """The middle of a picture whose shorter side was resized to `side` pixels."""
    width, height, left, top = crop_window(*image.size, side)
    columns_first = as_pillow_13 and columns_come_first(image.size, (width, height))
    shorter, longer = sorted(image.size)
    cut = max(longer - LONGEST_SIDE_RATIO * shorter, 0) // (2 * shorter) * shorter
    if cut:
        # By whole multiples of the shorter side, so that pixels of the result lie where they did.
        wide = image.width > image.height
        image = image.crop(
            (cut, 0, image.width - cut, image.height) if wide else (0, cut, image.width, image.height - cut)
        )
        width, height, left, top = crop_window(*image.size, side)
    return _resized(image, width, height, columns_first).crop((left, top, left + side, top + side))


def _padded(image: Image.Image, side: int, colour: tuple[int, int, int]) -> Image.Image:
    """A picture in the middle of a square of its longer side, resized to `side` pixels; the square is never made."""
    width, height = image.size
    if width >= height:
        rows = image.resize((side, height))
    elif height <= max(LONGEST_SIDE_RATIO * width, _LONGEST_EXACT_TALL):
        return _in_column(_padded_rows(image, side, colour), height, colour).resize((side, side))
    else:  # columns first, which rounds otherwise
        turned = _padded(image.transpose(Image.Transpose.TRANSPOSE), side, colour)
        return turned.transpose(Image.Transpose.TRANSPOSE)
    return _in_column(rows, width, colour).resize((side, side))


def _in_column(rows: Image.Image, height: int, colour: tuple[int, int, int]) -> Image.Image:
    """Rows in the middle of `height` rows."""
    if rows.height == height:
        return rows
    column = Image.new("RGB", (rows.width, height), colour)
    column.paste(rows, (0, (height - rows.height) // 2))
    return column


def _padded_rows(image: Image.Image, side: int, colour: tuple[int, int, int]) -> Image.Image:
    """The rows of a tall picture, each padded to its height in pixels and resized to `side`."""
    width, height = image.size
    found = Image.new("RGB", (side, height))
    count = max(_BLOCK_PIXELS // height, 1)
    for top in range(0, height, count):
        bottom = min(top + count, height)
        block = Image.new("RGB", (height, bottom - top), colour)
        block.paste(image.crop((0, top, width, bottom)), ((height - width) // 2, 0))
        found.paste(block.resize((side, bottom - top)), (0, top))
    return found
