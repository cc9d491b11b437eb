"""What a picture becomes for VILA-U: as many rows of the sequence as it has positions with codes. No torch.

Codes are read from the dataset, so no pixel is decoded in training: there are no views.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_eve.models.family import ImagePlan, ImagePlanner
from megatron_eve.models.image_flags import ImageFlag, ImageSetting, ImageSettings
from megatron_eve.models.vila_u.config import VILAUConfig

IMAGE_FLAGS = {
    "code_grid": ImageFlag(
        16, "positions with codes along each side of an image, which its vision tower decides", metavar="N"
    ),
}
"""Settings that a dataset is made for; see `ModelFamily.image_flags`. The default is the tower's of 256 pixels."""


def image_settings(vision: VILAUConfig) -> dict[str, ImageSetting]:
    """See `ModelFamily.image_settings`."""
    return {"code_grid": vision.code_grid}


def image_setting_errors(settings: ImageSettings) -> Iterator[str]:
    """See `ModelFamily.check_image_settings`."""
    if int(settings["code_grid"]) < 1:
        yield f"--code-grid {settings['code_grid']}: use 1 or more"


def planner(settings: ImageSettings) -> ImagePlanner:
    """What pictures become; see `ModelFamily.image_planner`."""
    settings = {name: settings.get(name, flag.default) for name, flag in IMAGE_FLAGS.items()}
    for error in image_setting_errors(settings):
        raise ValueError(error)
    side = int(settings["code_grid"])
    plan = ImagePlan(side * side, (side, side), {})

    def planned(width: int, height: int) -> ImagePlan:
        if width < 1 or height < 1:
            raise ValueError(
                f"a picture of {width} x {height} pixels has no area: leave it out of the dataset"
            )
        return plan

    return planned
