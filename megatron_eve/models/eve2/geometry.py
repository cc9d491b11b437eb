"""Image size -> resized size -> grid -> rows of the sequence, and what is decoded of a picture. No torch.

Follows the two published rules of EVE v2 (baaivision/EVE, folder EVEv2): one for training, one for evaluation. The
pixels of a picture are bounded, roughly, and not its sides; its aspect ratio is kept as far as multiples of 32 pixels
allow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import get_args

from megatron_eve.models.eve2.config import EVE2Config, ImageResize
from megatron_eve.models.family import ImagePlan, ImagePlanner, View
from megatron_eve.models.image_flags import ImageFlag, ImageSetting, ImageSettings

PATCH_SIZE, MERGE = 16, 2
"""Side of a patch in pixels, and patches along each side of what becomes one row."""
CELL = PATCH_SIZE * MERGE
"""Side in pixels of what becomes one row."""
PATCH_VALUES = 3 * PATCH_SIZE**2
"""Numbers of a patch: its pixels in three colours."""
PAD_COLOUR = (122, 116, 104)
"""CLIP's mean colour, of the published stand-in for a picture."""

IMAGE_FLAGS = {
    "max_image_side": ImageFlag(800, "pixels of an image, as the side of a square of as many: 800 or 1600"),
    "image_resize": ImageFlag(
        "shrink",
        "how an image gets its size. shrink: those above --max-image-side are made smaller, sides rounded to the next "
        "multiple of 32 (published training); scale: all are made as large, sides rounded up (published evaluation)",
        choices=get_args(ImageResize),
    ),
}
"""Settings that a dataset is made for; see `ModelFamily.image_flags`."""


def resized(width: int, height: int, max_side: int, resize: str) -> tuple[int, int]:
    """Width and height in pixels, multiples of 32, that a picture of `width` x `height` pixels is resized to.

    Computed in float64 in the published order, which decides on which side of a whole number a quotient falls: an exact
    formula differs for 156 of 2,398 square sizes.

    Args:
        width, height: of the upright picture, in pixels, each at least 1.
        max_side: side in pixels of the square that has as many pixels as a large picture gets.
        resize: "shrink" or "scale", see `EVE2Config.image_resize`.
    """
    ratio = math.sqrt(width * height) / max_side
    if resize == "scale":
        return tuple(max(math.ceil(side / ratio / CELL) * CELL, CELL) for side in (width, height))  # type: ignore[return-value]
    shrink = max(ratio, 1.0)
    return tuple(max(round(side / shrink / CELL), 1) * CELL for side in (width, height))  # type: ignore[return-value]


def image_settings(vision: EVE2Config) -> dict[str, ImageSetting]:
    """See `ModelFamily.image_settings`."""
    return {name: getattr(vision, name) for name in IMAGE_FLAGS}


def image_setting_errors(settings: ImageSettings) -> Iterator[str]:
    """See `ModelFamily.check_image_settings`."""
    side = int(settings["max_image_side"])
    if side < CELL:
        yield f"--max-image-side {side}: is smaller than what becomes one row; use {CELL} or more (800 as published)"


def planner(settings: ImageSettings) -> ImagePlanner:
    """What pictures become; see `ModelFamily.image_planner`. The only view is "patches"."""
    settings = {name: settings.get(name, flag.default) for name, flag in IMAGE_FLAGS.items()}
    for error in image_setting_errors(settings):
        raise ValueError(error)
    max_side, resize = int(settings["max_image_side"]), str(settings["image_resize"])

    def plan(width: int, height: int) -> ImagePlan:
        if width < 1 or height < 1:
            raise ValueError(
                f"a picture of {width} x {height} pixels has no area: leave it out of the dataset"
            )
        new_width, new_height = resized(width, height, max_side, resize)
        rows, columns = new_height // CELL, new_width // CELL
        patches = View(new_width, new_height, PAD_COLOUR, patch_size=PATCH_SIZE, merge=MERGE)
        return ImagePlan(1 + rows * (columns + 1), (rows, columns), {"patches": patches})

    return plan
