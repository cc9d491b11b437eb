"""Pictures in tiles: which grid a picture gets, and its pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_eve.data.batch import expand
from megatron_eve.data.images import view_of
from megatron_eve.data.images.decode import DEFAULT_MAX_PIXELS
from megatron_eve.data.images.interface import DecodeSettings, ImageTask
from megatron_eve.data.images.patches import picture_of
from megatron_eve.data.images.threads import ThreadsDecoder
from megatron_eve.data.text.conversation import IMAGE_TOKEN_ID
from megatron_eve.models.vila.geometry import VIEW, planner
from megatron_eve.models.vila.tiles import MOST_TILES, tile_grid
from tests.data.helpers import encoded
from tests.data.images.test_decoders import photo

SETTINGS = {
    "image_size": 28, "vision_patch_size": 7, "projector_type": "mlp_downsample", "image_fit": "tiles",
    "vision_model_type": "siglip", "max_tiles": 12,
}  # fmt: skip


def published(width: int, height: int, side: int, most: int) -> tuple[int, int]:
    """The rule as its code has it, in other words: every grid in the order of its tiles, the last of the best kept."""
    grids = {(i, j) for n in range(1, most + 1) for i in range(1, n + 1) for j in range(1, n + 1)}
    ratios = sorted((grid for grid in grids if grid[0] * grid[1] <= most), key=lambda grid: grid[0] * grid[1])
    nearest = min(abs(width / height - i / j) for i, j in ratios)
    tied = [(i, j) for i, j in ratios if abs(width / height - i / j) == nearest]
    large = [(i, j) for i, j in tied[1:] if width * height > 0.5 * side * side * i * j]
    return large[-1] if large else tied[0]


@pytest.mark.parametrize(
    ("size", "side", "grid"),
    [
        # A square is one tile, or four if it has more than half of their pixels, or nine.
        ((633, 633), 448, (1, 1)), ((634, 634), 448, (2, 2)), ((950, 950), 448, (2, 2)), ((951, 951), 448, (3, 3)),
        ((633, 633), 384, (2, 2)),  # so the tie depends on the side of a tile
        # 3.5 is as near to 3 : 1 as to 4 : 1 and 6 : 2.
        ((700, 200), 448, (3, 1)), ((1400, 400), 448, (4, 1)), ((2800, 800), 448, (6, 2)), ((300, 200), 448, (3, 2)),
        ((1000, 1), 448, (12, 1)), ((1, 1000), 448, (1, 12)), ((640, 480), 448, (4, 3)), ((16, 9), 448, (2, 1)),
    ],
)  # fmt: skip
def test_the_grid_of_a_picture(size: tuple[int, int], side: int, grid: tuple[int, int]) -> None:
    assert tile_grid(*size, side, 12) == grid == published(*size, side, 12)


@pytest.mark.parametrize("most", [1, 2, 6, 12])
def test_every_size_as_published(most: int) -> None:
    for width in range(1, 1500, 37):
        for height in range(1, 1500, 41):
            assert tile_grid(width, height, 384, most) == published(width, height, 384, most)


def test_a_picture_of_the_size_of_its_grid_keeps_it() -> None:
    for columns in range(1, MOST_TILES + 1):
        for rows in range(1, MOST_TILES // columns + 1):
            for most in range(columns * rows, MOST_TILES + 1):
                assert tile_grid(columns * 28, rows * 28, 28, most) == (columns, rows)


@pytest.mark.parametrize("size", [(300, 120), (90, 260), (20, 20), (300, 200)])
def test_tiles_row_by_row_and_the_whole_picture_behind_them(size: tuple[int, int]) -> None:
    image = photo(*size)
    plan = planner(SETTINGS)(*size)
    view, (columns, rows) = plan.views[VIEW], tile_grid(*size, 28, 12)
    found = view_of(image, view)
    resized = image.resize((28 * columns, 28 * rows))
    expected = [
        resized.crop((28 * x, 28 * y, 28 * x + 28, 28 * y + 28)) for y in range(rows) for x in range(columns)
    ]
    if len(expected) > 1:
        expected.append(image.resize((28, 28)))
    assert plan.tiles == len(expected) and plan.rows == 4 * len(expected)
    assert found.shape == view.shape == (len(expected), 28, 28, 3)
    # Another Pillow may resize rows and columns in the other order, which rounds otherwise.
    difference = abs(found.astype(int) - np.stack([np.asarray(tile) for tile in expected]))
    assert difference.max() <= 1
    assert abs(picture_of(found, view).astype(int) - np.asarray(resized)).max() <= 1


def test_threads_give_the_same_tiles() -> None:
    decoder = ThreadsDecoder(DecodeSettings(True, DEFAULT_MAX_PIXELS), threads=1)
    for size in ((300, 120), (20, 20)):
        image = encoded(photo(*size), "PNG")
        view = planner(SETTINGS)(*size).views[VIEW]
        (found,) = decoder.prepare([ImageTask(image, {VIEW: view})])
        expected = torch.from_numpy(view_of(photo(*size), view))
        assert isinstance(found, dict) and found[VIEW].shape == view.shape
        assert (found[VIEW].int() - expected.int()).abs().max() <= 9
    decoder.close()


def test_a_tile_takes_a_placeholder() -> None:
    """Two tiles and the whole picture, each with a text behind it."""
    plan = planner(SETTINGS)(50, 25)
    assert (plan.tiles, plan.rows) == (3, 12)
    tokens = np.array([1, IMAGE_TOKEN_ID, 9, IMAGE_TOKEN_ID, 9, IMAGE_TOKEN_ID, 9, 5])
    expanded, labels, starts = expand(tokens, np.array([-100] * 7 + [5]), [plan])
    assert expanded.tolist() == [1, *([0, 0, 0, 0, 9] * 3), 5]
    assert starts.tolist() == [1, 6, 11] and labels.tolist() == [-100] * 15 + [5, -100]


def test_one_tile_is_a_stretched_picture() -> None:
    """Its text is that of a picture without tiles: no newline is put behind it."""
    one = planner(SETTINGS | {"max_tiles": 1})(300, 120)
    stretched = planner(SETTINGS | {"max_tiles": 1, "image_fit": "stretch"})(300, 120)
    assert one._replace(views=stretched.views) == stretched and not one.is_tiled
    tiles = view_of(photo(300, 120), one.views[VIEW])
    assert (tiles == view_of(photo(300, 120), stretched.views[VIEW])[None]).all()
