"""Image size -> resized size -> token grid -> token count, and what is decoded of a picture. Integers alone, no torch.

Follows the any-resolution rule of EVE v1 (baaivision/EVE, `mm_utils.process_images`): the long side of a
picture takes all of the teacher's patches, the short side as many whole ones as it touches, and the model
sees the picture at a whole multiple of the teacher's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_eve.models.eve.constants import PAD_COLOUR
from megatron_eve.models.family import ImagePlan, ImagePlanner, View
from megatron_eve.models.image_flags import ImageFlag, ImageSettings

PATCH_SIZE = 14
"""Side of a patch in pixels, for the model and for the teacher."""

PATCH_VALUES = 3 * PATCH_SIZE**2
"""Numbers of a patch: its pixels in three colours."""

MERGE = 2
"""Patches along each side of a merged patch, which becomes one token."""

IMAGE_FLAGS = {
    "image_size": ImageFlag(672, "long side for the model: 672, or 1344 for the HD model"),
    "teacher_size": ImageFlag(336, "side for the teacher"),
    "teacher_patch_size": ImageFlag(PATCH_SIZE, "side of the teacher's own patches, for pixels", ("pixels",)),
}
"""Sizes that a dataset is made for, in pixels; see `ModelFamily.image_flags`."""


@dataclass(frozen=True)
class ImageGeometry:
    """What one picture becomes. Pixels for sizes, tokens for the grid.

    Attributes:
        width, height: the picture resized for the model, in pixels (multiples of 28).
        rows, columns: the token grid; one token is a merged patch, of 2 x 2 patches of 14 pixels.
        teacher_width, teacher_height: the picture resized for the teacher, in pixels (multiples of 14).
    """

    width: int
    height: int
    rows: int
    columns: int
    teacher_width: int
    teacher_height: int

    @property
    def tokens(self) -> int:
        """Positions in the sequence: one CLS, and in each row its merged patches and a row-end token."""
        return 1 + self.rows * (self.columns + 1)

    @property
    def patches(self) -> int:
        """14 x 14 patches of the resized picture."""
        return MERGE**2 * self.rows * self.columns

    def teacher_picture(self, patch_size: int) -> tuple[int, int]:
        """Width and height in pixels of the picture for a teacher with patches of `patch_size` pixels."""
        return teacher_pixels(self.teacher_width, patch_size), teacher_pixels(self.teacher_height, patch_size)


def teacher_pixels(pixels: int, patch_size: int) -> int:
    """A length in pixels of 14-pixel patches, for a teacher with patches of `patch_size` pixels."""
    return pixels // PATCH_SIZE * patch_size


def check_sizes(image_size: int, teacher_size: int) -> None:
    """Raise ValueError unless these sizes, in pixels, give whole merged patches (2 x 2) for every picture."""
    if teacher_size < PATCH_SIZE or teacher_size % PATCH_SIZE:
        raise ValueError(
            f"teacher size {teacher_size} is not a positive multiple of the patch size {PATCH_SIZE}: "
            "use the size the teacher was trained at, 336 for CLIP ViT-L/14-336"
        )
    if image_size < 2 * teacher_size or image_size % (2 * teacher_size):
        raise ValueError(
            f"image size {image_size} is not a multiple of twice the teacher size {teacher_size}: "
            f"use {2 * teacher_size} or {4 * teacher_size}"
        )


def image_geometry(width: int, height: int, image_size: int, teacher_size: int = 336) -> ImageGeometry:
    """Geometry of a picture of `width` x `height` pixels; exact in integers for every size.

    The short side is stretched up to the next teacher patch, so the aspect ratio is kept only roughly.

    Args:
        width, height: the upright raw picture, in pixels, each at least 1.
        image_size: long side of the resized picture, in pixels (672 or 1344 as published).
        teacher_size: side of the teacher's picture, in pixels.

    Raises:
        ValueError: for a size below 1 or sizes that do not divide into merged patches (2 x 2).
    """
    check_sizes(image_size, teacher_size)
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width} x {height} pixels has no area: leave it out of the dataset")
    longest = teacher_size // PATCH_SIZE
    shortest = -(-longest * min(width, height) // max(width, height))
    columns, rows = (longest, shortest) if width > height else (shortest, longest)
    scale = image_size // teacher_size
    return ImageGeometry(
        width=columns * PATCH_SIZE * scale,
        height=rows * PATCH_SIZE * scale,
        rows=rows * scale // 2,
        columns=columns * scale // 2,
        teacher_width=columns * PATCH_SIZE,
        teacher_height=rows * PATCH_SIZE,
    )


def image_setting_errors(settings: ImageSettings) -> Iterator[str]:
    """Errors in the settings of a dataset; see `ModelFamily.check_image_settings`."""
    try:
        check_sizes(int(settings["image_size"]), int(settings["teacher_size"]))
    except ValueError as error:
        yield f"--image-size, --teacher-size: {error}"
    if int(settings["teacher_patch_size"]) < 1:
        yield f"--teacher-patch-size {settings['teacher_patch_size']}: use 1 or more"


def planner(settings: ImageSettings) -> ImagePlanner:
    """What pictures become; see `ModelFamily.image_planner`. Views are "patches" and "teacher" (a square)."""
    image_size, teacher_size, patch_size = (
        int(settings.get(name, flag.default)) for name, flag in IMAGE_FLAGS.items()
    )
    check_sizes(image_size, teacher_size)

    def plan(width: int, height: int) -> ImagePlan:
        geometry = image_geometry(width, height, image_size, teacher_size)
        teacher_width, teacher_height = geometry.teacher_picture(patch_size)
        patches = View(geometry.width, geometry.height, PAD_COLOUR, patch_size=PATCH_SIZE, merge=MERGE)
        teacher = View(
            teacher_width,
            teacher_height,
            PAD_COLOUR,
            square=teacher_pixels(teacher_size, patch_size),
            margin_unit=patch_size,
        )
        return ImagePlan(
            geometry.tokens, (geometry.rows, geometry.columns), {"patches": patches, "teacher": teacher}
        )

    return plan
