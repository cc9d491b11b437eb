"""A picture to its views: resized, laid on a square, cut into patches (`View` in models/family.py). Needs no torch."""

from __future__ import annotations

import numpy as np
from PIL import Image

from megatron_eve.data.images.resizing import Pixels, fitted
from megatron_eve.data.images.tiles import cut_views, uncut_picture, uncut_views
from megatron_eve.models.family import View


def cut_patches(pixels: Pixels, patch_size: int, merge: int = 1) -> Pixels:
    """Cut a resized picture into square patches, grouped merge x merge.

    Args:
        pixels: uint8 [H, W, 3], H and W multiples of `patch_size * merge`.
        patch_size: side of a patch in pixels.
        merge: patches along each side of a group.

    Returns:
        uint8 [H * W / patch_size ** 2, 3 * patch_size ** 2]: groups row by row; in a group its patches row by row, with
        merge 2 (0,0), (0,1), (1,0), (1,1); in a patch (channel, y, x), the layout of a convolution's weight.
    """
    height, width, channels = pixels.shape
    rows, columns = height // (merge * patch_size), width // (merge * patch_size)
    grid = pixels.reshape(rows, merge, patch_size, columns, merge, patch_size, channels)
    groups = grid.transpose(0, 3, 1, 4, 6, 2, 5)  # (rows, columns, merge, merge, channel, y, x)
    return np.ascontiguousarray(groups).reshape(-1, channels * patch_size * patch_size)


def uncut_patches(patches: Pixels, width: int, height: int, patch_size: int, merge: int = 1) -> Pixels:
    """The resized picture that patches were cut from: the inverse of `cut_patches`.

    Args:
        patches: uint8 [width * height / patch_size ** 2, 3 * patch_size ** 2].
        width, height: of the picture, in pixels.
        patch_size, merge: as it was cut.

    Returns:
        uint8 [height, width, 3], contiguous.
    """
    side = merge * patch_size
    groups = patches.reshape(height // side, width // side, merge, merge, 3, patch_size, patch_size)
    grid = groups.transpose(0, 2, 5, 1, 3, 6, 4)  # (rows, merge, y, columns, merge, x, channel)
    return np.ascontiguousarray(grid).reshape(height, width, 3)


def square_margin(square: int, side: int, unit: int) -> int:
    """Pixels left of (or above) a picture in the middle of a square, as published.

    Args:
        square: side of the square in pixels.
        side: of the picture, in pixels.
        unit: the margin is a whole multiple of this; an odd remainder goes to the other side.
    """
    return (square - side) // unit // 2 * unit


def padded_square(pixels: Pixels, size: int, unit: int, colour: tuple[int, int, int]) -> Pixels:
    """The published square canvas: a picture in the middle, one colour around it.

    Args:
        pixels: uint8 [H, W, 3], a resized picture.
        size: side of the square in pixels.
        unit: of the margins, see `square_margin`.
        colour: red, green and blue of the margins, 0 to 255.
    """
    return with_margins(pixels, size, size, unit, colour)


def with_margins(pixels: Pixels, rows: int, columns: int, unit: int, colour: tuple[int, int, int]) -> Pixels:
    """The same with sides of their own: uint8 [rows, columns, 3]."""
    height, width, _ = pixels.shape
    top, left = square_margin(rows, height, unit), square_margin(columns, width, unit)
    # Whole rows are copied: a broadcast of three bytes costs ten times as much.
    canvas = np.tile(np.array(colour, dtype=np.uint8), (columns, 1))[None].repeat(rows, axis=0)
    canvas[top : top + height, left : left + width] = pixels
    return canvas


def view_of(image: Image.Image, view: View) -> Pixels:
    """A view of an upright RGB picture, bit-equal to the published preprocessing: uint8 of `view.shape`."""
    if view.tile:
        parts = {name: fitted(image, part) for name, part in uncut_views({"": view}).items()}
        found: Pixels = cut_views(parts, {"": view})[""]
        return found
    return finished(fitted(image, view), view)


def finished(pixels: Pixels, view: View) -> Pixels:
    """Turn a resized picture into its view: uint8 [view.height, view.width, 3] -> uint8 of `view.shape`."""
    if view.square:
        pixels = padded_square(pixels, view.square, view.margin_unit, view.pad_colour)
    return cut_patches(pixels, view.patch_size, view.merge) if view.patch_size else pixels


def picture_of(pixels: Pixels, view: View) -> Pixels:
    """The resized picture that a view was made of, the inverse of `finished`: uint8 [view.height, view.width, 3]."""
    if view.tile:
        return uncut_picture(pixels, view)
    if view.patch_size:
        width, height = (view.square, view.square) if view.square else (view.width, view.height)
        pixels = uncut_patches(pixels, width, height, view.patch_size, view.merge)
    if not view.square:
        return pixels
    left, top = (square_margin(view.square, side, view.margin_unit) for side in (view.width, view.height))
    return pixels[top : top + view.height, left : left + view.width]


def stored_shape(view: View) -> tuple[int, ...]:
    """Shape in which a dataset stores a view: without the padding to a square."""
    return (view.height, view.width, 3) if view.square else view.shape


def to_stored(pixels: Pixels, view: View) -> Pixels:
    """A view as a dataset stores it: uint8 of `view.shape` -> uint8 of `stored_shape(view)`."""
    return picture_of(pixels, view) if view.square else pixels


def from_stored(pixels: Pixels, view: View) -> Pixels:
    """A view from what a dataset stores: uint8 of `stored_shape(view)` -> uint8 of `view.shape`."""
    return finished(pixels, view) if view.square else pixels
