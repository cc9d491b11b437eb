"""Resize a picture and cut it into patches, in the order in which the patch embedding wants them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_eve.data.geometry import PATCH_SIZE, ImageGeometry, square_margin, teacher_pixels
from megatron_eve.data.images.constants import PAD_COLOUR


def resize(image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    """`image` (RGB) resized as published, with Pillow's default filter: bicubic, antialiased.

    Rows first, then columns: every Pillow before 13 does so by itself, while 13 takes the columns first where that is
    less work, and rounds to other bytes.

    Returns:
        uint8 [height, width, 3], writable and contiguous.
    """
    return np.array(image.resize((width, image.height)).resize((width, height)), dtype=np.uint8)


def cut_patches(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Cut a resized picture into 14 x 14 patches, grouped in 2 x 2 cells.

    Args:
        pixels: uint8 [H, W, 3], H and W multiples of 28.

    Returns:
        uint8 [H * W / 196, 588]: cells row by row; in a cell the patches (0,0), (0,1), (1,0), (1,1); in a
        patch (channel, y, x), the layout of a convolution's weight.
    """
    height, width, channels = pixels.shape
    rows, columns = height // (2 * PATCH_SIZE), width // (2 * PATCH_SIZE)
    grid = pixels.reshape(rows, 2, PATCH_SIZE, columns, 2, PATCH_SIZE, channels)
    cells = grid.transpose(0, 3, 1, 4, 6, 2, 5)  # (rows, columns, 2, 2, channel, y, x)
    return np.ascontiguousarray(cells).reshape(-1, channels * PATCH_SIZE * PATCH_SIZE)


def uncut_patches(patches: NDArray[np.uint8], geometry: ImageGeometry) -> NDArray[np.uint8]:
    """The resized picture that patches were cut from: the inverse of `cut_patches`.

    Args:
        patches: uint8 [geometry.patches, 588].
        geometry: of the picture.

    Returns:
        uint8 [geometry.height, geometry.width, 3], contiguous.
    """
    cells = patches.reshape(geometry.rows, geometry.columns, 2, 2, 3, PATCH_SIZE, PATCH_SIZE)
    grid = cells.transpose(0, 2, 5, 1, 3, 6, 4)  # (rows, 2, y, columns, 2, x, channel)
    return np.ascontiguousarray(grid).reshape(geometry.height, geometry.width, 3)


def image_patches(image: Image.Image, geometry: ImageGeometry) -> NDArray[np.uint8]:
    """Patches of an upright RGB picture at the model's size: uint8 [geometry.patches, 588].

    See `cut_patches` for their order.
    """
    return cut_patches(resize(image, geometry.width, geometry.height))


def padded_square(pixels: NDArray[np.uint8], size: int, unit: int) -> NDArray[np.uint8]:
    """The published square canvas: a picture in the middle, the pad colour around it.

    Args:
        pixels: uint8 [H, W, 3], a resized picture.
        size: side of the square in pixels.
        unit: of the margins, see `square_margin`.
    """
    height, width, _ = pixels.shape
    top, left = (square_margin(size, side, unit) for side in (height, width))
    # Whole rows are copied: a broadcast of three bytes costs ten times as much.
    canvas = np.tile(np.array(PAD_COLOUR, dtype=np.uint8), (size, 1))[None].repeat(size, axis=0)
    canvas[top : top + height, left : left + width] = pixels
    return canvas


def teacher_square(
    image: Image.Image, geometry: ImageGeometry, teacher_size: int, patch_size: int
) -> NDArray[np.uint8]:
    """An upright RGB picture as the teacher sees it, the grey margins included.

    Args:
        image: the raw picture.
        geometry: its geometry; the teacher's grid is that of 14-pixel patches in `teacher_size`.
        teacher_size: as in the model's configuration, in pixels of 14-pixel patches.
        patch_size: side of the teacher's own patches; another size than 14 scales its picture.

    Returns:
        uint8 [S, S, 3] with S = teacher_size / 14 * patch_size.
    """
    picture = resize(image, *geometry.teacher_picture(patch_size))
    return padded_square(picture, teacher_pixels(teacher_size, patch_size), patch_size)
