"""What a picture becomes for VILA: a square or several, and rows of the sequence. No torch.

Follows the published code (NVlabs/VILA v1.0 `process_image` and its projectors): every picture becomes a square of one
size, so all have the same number of rows; in tiles (NVILA) it becomes several.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args, get_type_hints

from megatron_eve.models.family import ImagePlan, ImagePlanner, View
from megatron_eve.models.image_flags import ImageFlag, ImageSetting, ImageSettings
from megatron_eve.models.towers.normalisation import NORMALISATION
from megatron_eve.models.vila.config import BLOCKS, ProjectorType, VILAConfig
from megatron_eve.models.vila.tiles import MOST_TILES, tile_grid

VIEW = "tower"
"""The view of a picture: uint8 [image_size, image_size, 3], or [tiles, image_size, image_size, 3]."""

_QUERIES = "qformer"


def _choices(name: str) -> tuple[str, ...]:
    return get_args(get_type_hints(VILAConfig)[name])


IMAGE_FLAGS = {
    "image_size": ImageFlag(336, "side of the square picture that the vision tower sees"),
    "vision_patch_size": ImageFlag(14, "side of a patch of the vision tower"),
    "projector_type": ImageFlag(
        "mlp2x_gelu",
        "what turns features of the vision tower into rows; all that give the same number of rows may be trained on "
        "the dataset",
        choices=get_args(ProjectorType),
        alike=(("linear", "mlp2x_gelu", "mlp3x_gelu"), ("mlp_downsample", "mlp_downsample_2x2_fix")),
    ),
    "qformer_num_queries": ImageFlag(64, "rows of an image with --projector-type qformer", metavar="N"),
    "image_fit": ImageFlag(
        "pad",
        "how an image becomes a square, for jpeg and pixels. pad: margins of the vision tower's mean colour; crop: the "
        "middle of it; stretch: its aspect ratio is lost; tiles: as many squares as --max-tiles allows",
        ("jpeg", "pixels"),
        choices=_choices("image_fit"),
    ),
    "max_tiles": ImageFlag(
        1,
        f"most tiles of an image with --image-fit tiles, up to {MOST_TILES}, without the whole image behind them; the "
        "published code has 6 for interleaved documents and 12 else",
        metavar="N",
        at_most=True,
        beside="--image-fit tiles",
    ),
    "vision_model_type": ImageFlag(
        "clip",
        "architecture of the vision tower, which has the colour of margins, for jpeg and pixels",
        ("jpeg", "pixels"),
        choices=_choices("vision_model_type"),
    ),
}
"""Settings that a dataset is made for; see `ModelFamily.image_flags`. The defaults are VILA-7B's."""


def image_settings(vision: VILAConfig) -> dict[str, ImageSetting]:
    """See `ModelFamily.image_settings`."""
    unused = () if vision.projector_type == _QUERIES else ("qformer_num_queries",)
    settings = {name: getattr(vision, name) for name in IMAGE_FLAGS if name not in unused}
    return settings if vision.image_fit == "tiles" else settings | {"max_tiles": 1}


def image_setting_errors(settings: ImageSettings) -> Iterator[str]:
    """See `ModelFamily.check_image_settings`."""
    yield from _number_errors(settings)
    tiles, fit = settings["max_tiles"], settings["image_fit"]
    if tiles != 1 and fit != "tiles":
        yield f"--max-tiles {tiles}: is for --image-fit tiles, and this is {fit}; leave it out, or give that"


def _number_errors(settings: ImageSettings) -> Iterator[str]:
    """Numbers that cannot be. A size need be no multiple of the patch: the rest is not looked at."""
    size, patch = int(settings["image_size"]), int(settings["vision_patch_size"])
    if patch < 1:
        yield f"--vision-patch-size {patch}: use 1 or more"
    elif size < patch:
        yield (
            f"--image-size {size}: is smaller than a patch of the vision tower (--vision-patch-size {patch}); use the "
            "size that the tower was trained at"
        )
    if int(settings["qformer_num_queries"]) < 1:
        yield f"--qformer-num-queries {settings['qformer_num_queries']}: use 1 or more"
    if not 1 <= int(settings["max_tiles"]) <= MOST_TILES:
        yield f"--max-tiles {settings['max_tiles']}: use 1 to {MOST_TILES}"


def pad_colour(vision_model_type: str) -> tuple[int, int, int]:
    """Colour of the margins around a picture, 0 to 255: the mean, cut to whole numbers, as published."""
    means, _ = NORMALISATION[vision_model_type]
    red, green, blue = (int(255 * mean) for mean in means)
    return red, green, blue


def row_grid(projector_type: str, grid: int, queries: int) -> tuple[int, int]:
    """How the rows of a picture lie in it: rows and columns; all in one row where they have no place.

    Args:
        projector_type: as `VILAConfig` has it.
        grid: features along each side of the picture. An odd side is padded to whole blocks.
        queries: of the projector that has some.
    """
    if projector_type == _QUERIES:
        return 1, queries
    side = -(-grid // BLOCKS.get(projector_type, 1))
    return side, side


def projector_rows(projector_type: str, grid: int, queries: int) -> int:
    """Rows of a picture in the sequence; see `row_grid`."""
    rows, columns = row_grid(projector_type, grid, queries)
    return rows * columns


def planner(settings: ImageSettings) -> ImagePlanner:
    """What pictures become; see `ModelFamily.image_planner`. The only view is `VIEW`, a square or several.

    More than one tile means --image-fit tiles, which is no setting of a dataset that holds the files.
    """
    settings = {name: settings.get(name, flag.default) for name, flag in IMAGE_FLAGS.items()}
    for error in _number_errors(settings):
        raise ValueError(error)
    side = int(settings["image_size"])
    grid = row_grid(
        str(settings["projector_type"]),
        side // int(settings["vision_patch_size"]),
        int(settings["qformer_num_queries"]),
    )
    # The golden pictures were made with Pillow 13.
    view = View(side, side, pad_colour(str(settings["vision_model_type"])), pass_order="pillow13")
    fits = {
        "pad": view._replace(fit="pad"),
        "crop": view._replace(fit="crop"),
        "stretch": view,
        # Also of a dataset of one tile a picture, which may share a pack with others.
        "tiles": view._replace(tile=side),
    }
    max_tiles = int(settings["max_tiles"])
    plan = ImagePlan(grid[0] * grid[1], grid, {VIEW: fits[str(settings["image_fit"])]})

    def planned(width: int, height: int) -> ImagePlan:
        if width < 1 or height < 1:
            raise ValueError(
                f"a picture of {width} x {height} pixels has no area: leave it out of the dataset"
            )
        if max_tiles == 1:
            return plan
        columns, rows = tile_grid(width, height, side, max_tiles)
        tiled = view._replace(width=columns * side, height=rows * side, tile=side)
        tiles = tiled.shape[0]
        return ImagePlan(tiles * plan.rows, grid, {VIEW: tiled}, tiles, is_tiled=True)

    return planned
