"""What a picture becomes, from its width and height alone."""

from __future__ import annotations

from megatron_eve.models.family import ImagePlan, ImagePlanner, View
from megatron_eve.models.image_flags import ImageFlag, ImageSettings

IMAGE_FLAGS = {
    "toy_image_size": ImageFlag(64, "pixels of a picture's long side"),
    "toy_patch_size": ImageFlag(16, "side of a patch in pixels"),
}
_GREY = (128, 128, 128)  # of a picture that cannot be decoded


def image_planner(settings: ImageSettings) -> ImagePlanner:
    """Long side of `toy_image_size` pixels, short side of whole patches; a row of the sequence for each patch."""
    longest, patch = (int(settings.get(name, flag.default)) for name, flag in IMAGE_FLAGS.items())

    def plan(width: int, height: int) -> ImagePlan:
        if min(width, height) < 1:
            raise ValueError(
                f"a picture of {width} x {height} pixels has no area: leave it out of the dataset"
            )
        shortest = max(round(longest * min(width, height) / max(width, height) / patch), 1) * patch
        wide, high = (longest, shortest) if width > height else (shortest, longest)
        rows, columns = high // patch, wide // patch
        views = {
            "patches": View(wide, high, _GREY, patch_size=patch),
            "colour": View(1, 1, _GREY),  # resized to one pixel: the mean colour
        }
        return ImagePlan(rows * columns, (rows, columns), views)

    return plan
