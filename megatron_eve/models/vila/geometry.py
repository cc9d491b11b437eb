"""What a picture becomes for VILA, from its width and height alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from megatron_eve.models.family import ImageFlag, ImagePlan, ImagePlanner, ImageSetting, View
from megatron_eve.models.vila.config import ProjectorType, VILAConfig

IMAGE_FLAGS: dict[str, ImageFlag] = {
    "image_size": ImageFlag(336, "side of the square picture that the vision tower sees"),
    "vision_patch_size": ImageFlag(14, "side of a patch of the vision tower"),
    "projector_type": ImageFlag(
        "mlp2x_gelu", "projector, which decides the rows of a picture", choices=get_args(ProjectorType)
    ),
    "qformer_num_queries": ImageFlag(64, "rows of a picture with --projector-type qformer", metavar="N"),
}


def image_settings(vision: VILAConfig) -> dict[str, ImageSetting]:
    """See `ModelFamily.image_settings`."""
    return {name: getattr(vision, name) for name in IMAGE_FLAGS}


def image_setting_errors(settings: Mapping[str, Any]) -> Iterator[str]:
    """See `ModelFamily.check_image_settings`."""
    return iter(())


def projector_rows(projector_type: str, grid: int, queries: int) -> int:
    """Rows of a picture."""
    if projector_type == "qformer":
        return queries
    block = {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}.get(
        projector_type, 1
    )
    return int((-(-grid // block)) ** 2)


def planner(settings: Mapping[str, Any]) -> ImagePlanner:
    """See `ModelFamily.image_planner`."""
    size, patch, kind, queries = (settings.get(name, flag.default) for name, flag in IMAGE_FLAGS.items())
    rows = projector_rows(kind, size // patch, queries)
    side = rows if kind == "qformer" else int(rows**0.5)
    plan = ImagePlan(
        rows, (1, side) if kind == "qformer" else (side, side), {"tower": View(size, size, (127, 127, 127))}
    )
    return lambda width, height: plan
