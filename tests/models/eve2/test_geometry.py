"""Sizes of pictures for EVE v2 against those of the public code, under both rules."""

from __future__ import annotations

import json

import pytest

from megatron_eve.models.eve2.geometry import planner, resized
from tests.golden_dir import find_golden

RULES = {"train": "shrink", "eval": "scale"}


def test_sizes_rows_and_grids_are_the_published_ones() -> None:
    compared = 0
    for entry in json.loads(
        (find_golden("eve_v2") / "preprocess" / "sizes.json").read_text(encoding="utf-8")
    )["geometry"]:
        for rule, resize in RULES.items():
            for side in (800, 1600):
                golden = entry[f"{rule}_{side}"]
                plan = planner({"max_image_side": side, "image_resize": resize})(
                    entry["width"], entry["height"]
                )
                view = plan.views["patches"]
                assert [view.width, view.height] == golden["resized_wh"]
                assert list(plan.grid) == golden["grid_hw"]
                assert plan.rows == golden["tokens"]
                compared += 1
    assert compared >= 180


# As the reference says: halves go to the even number, and quotients just above a whole number are rounded up.
@pytest.mark.parametrize(
    ("side", "max_side", "resize", "expected"),
    [
        (80, 800, "shrink", 64),
        (112, 800, "shrink", 128),
        (144, 800, "shrink", 128),
        (1, 800, "shrink", 32),
        (57, 800, "scale", 832),
        (114, 800, "scale", 832),
        (57, 1600, "scale", 1632),
        (800, 800, "scale", 800),
    ],
)
def test_squares(side: int, max_side: int, resize: str, expected: int) -> None:
    assert resized(side, side, max_side, resize) == (expected, expected)


def test_a_thin_picture_becomes_long() -> None:
    assert resized(1, 40, 800, "scale") == (128, 5088)


def test_a_side_below_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--max-image-side 31: is smaller"):
        planner({"max_image_side": 31})
