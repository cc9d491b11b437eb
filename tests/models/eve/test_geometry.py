"""Image size -> grid, by the rule of the published model, exact for every size."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_eve.data.images.patches import square_margin
from megatron_eve.models.eve.geometry import image_geometry, image_setting_errors, planner, teacher_pixels
from tests.golden_dir import find_golden


@pytest.mark.parametrize("image_size", [672, 1344])
def test_every_golden_size(image_size: int) -> None:
    sizes = json.loads((find_golden("preprocess") / "sizes.json").read_text())["geometry"]
    assert len(sizes) == 13
    for size in sizes:
        golden = size[str(image_size)]
        found = image_geometry(size["width"], size["height"], image_size)
        assert [found.rows, found.columns] == golden["token_hw"]
        assert found.tokens == golden["n_image_tokens"]
        assert [found.width, found.height] == golden["needhw"][:2]
        assert [found.teacher_width, found.teacher_height] == golden["basehw"][:2]
        assert found.teacher_width * found.teacher_height == 14 * 14 * golden["n_clip_patches"]
        assert found.patches == math.prod(golden["patch_hw"])


def test_the_mini_model_of_the_golden_cases() -> None:
    meta = json.loads((find_golden("mini224_mixed") / "meta.json").read_text())
    wide = image_geometry(200, 150, meta["image_size"], meta["image_size_clip"])
    assert (wide.rows, wide.columns) == (6, 8)
    assert (wide.width, wide.height, wide.teacher_width, wide.teacher_height) == (224, 168, 112, 84)


@given(st.integers(1, 10**15), st.integers(1, 10**15), st.sampled_from([672, 1344]))
def test_exact_at_sizes_where_floats_are_not(width: int, height: int, image_size: int) -> None:
    found = image_geometry(width, height, image_size)
    short = math.ceil(Fraction(24 * min(width, height), max(width, height)))
    scale = image_size // 672
    assert max(found.rows, found.columns) == 24 * scale
    assert min(found.rows, found.columns) == short * scale
    assert (found.columns >= found.rows) if width > height else (found.rows >= found.columns)
    assert found.tokens == 1 + found.rows * (found.columns + 1)
    assert (found.width, found.height) == (28 * found.columns, 28 * found.rows)
    assert found.patches * 14 * 14 == found.width * found.height
    ratio = Fraction(image_size, 336)
    assert (found.teacher_width * ratio, found.teacher_height * ratio) == (found.width, found.height)


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from([(672, 336), (1344, 336), (224, 112), (448, 112)]),
)
def test_against_a_grid_that_is_drawn(width: int, height: int, sizes: tuple[int, int]) -> None:
    """The long side fills the square; patches are laid along the short side until they cover it, and counted."""
    image_size, teacher_size = sizes
    longest = teacher_size // 14
    patch = Fraction(max(width, height), longest)  # side of a teacher's patch in raw pixels
    covered, short = Fraction(0), 0
    while covered < min(width, height):
        covered, short = covered + patch, short + 1
    columns, rows = (longest, short) if width > height else (short, longest)
    merged = [
        (y, x)
        for y in range(rows * image_size // 28 // longest)
        for x in range(columns * image_size // 28 // longest)
    ]
    ends = len({y for y, _ in merged})

    found = image_geometry(width, height, image_size, teacher_size)
    assert (found.teacher_width, found.teacher_height) == (14 * columns, 14 * rows)
    assert (found.rows, found.columns) == (max(merged)[0] + 1, max(merged)[1] + 1)
    assert found.tokens == 1 + len(merged) + ends
    assert found.patches == 4 * len(merged)


@given(st.integers(1, 2000), st.integers(1, 2000), st.sampled_from([8, 14, 16, 32]))
def test_the_picture_of_the_teacher_in_its_square(width: int, height: int, patch: int) -> None:
    found = image_geometry(width, height, 672)
    square = teacher_pixels(336, patch)
    for side, at_14 in zip(
        found.teacher_picture(patch), (found.teacher_width, found.teacher_height), strict=True
    ):
        assert side * 14 == at_14 * patch
        before = square_margin(square, side, patch)
        assert before % patch == 0 and 0 <= square - side - 2 * before <= patch


@given(st.integers(1, 23), st.integers(10**15, 10**18))
def test_a_pixel_more_is_a_patch_more(patches: int, patch: int) -> None:
    """At these sizes a float takes `patches` patches and one pixel for `patches` patches."""
    exact = image_geometry(24 * patch, patches * patch, 672)
    more = image_geometry(24 * patch, patches * patch + 1, 672)
    assert (exact.rows, more.rows) == (patches, patches + 1)
    assert image_geometry(patches * patch + 1, 24 * patch, 672).columns == patches + 1


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((0, 5, 672), "0 x 5"),
        ((5, -1, 672), "5 x -1"),
        ((5, 5, 700), "image size 700"),
        ((5, 5, 336), "image size 336"),
        ((5, 5, 0), "image size 0"),
        ((5, 5, 672, 100), "teacher size 100"),
        ((5, 5, 672, 0), "teacher size 0"),
    ],
)
def test_impossible_sizes_are_refused_by_name(arguments: tuple[int, ...], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        image_geometry(*arguments)


@pytest.mark.parametrize("patch_size", [14, 16])
def test_what_is_decoded_of_a_picture(patch_size: int) -> None:
    """Patches of the resized picture in groups of 2 x 2; the teacher's picture in the middle of its square."""
    sizes = {"image_size": 672, "teacher_size": 336, "teacher_patch_size": patch_size}
    for width, height in ((640, 480), (480, 640), (5, 900), (31, 31)):
        plan, geometry = planner(sizes)(width, height), image_geometry(width, height, 672)
        assert (plan.rows, plan.grid) == (geometry.tokens, (geometry.rows, geometry.columns))
        patches, teacher = plan.views["patches"], plan.views["teacher"]
        assert (patches.width, patches.height) == (geometry.width, geometry.height)
        assert patches.shape == (geometry.patches, 588) and (patches.patch_size, patches.merge) == (14, 2)
        assert (teacher.width, teacher.height) == geometry.teacher_picture(patch_size)
        assert teacher.shape == (24 * patch_size, 24 * patch_size, 3) and teacher.margin_unit == patch_size
        assert patches.pad_colour == teacher.pad_colour == (122, 116, 104)
    assert planner({})(640, 480) == planner(sizes | {"teacher_patch_size": 14})(640, 480)


def test_sizes_of_a_dataset_are_checked() -> None:
    fine = {"image_size": 672, "teacher_size": 336, "teacher_patch_size": 14}
    assert list(image_setting_errors(fine)) == []
    (error,) = image_setting_errors(fine | {"image_size": 700})
    assert error.startswith("--image-size, --teacher-size: image size 700 is not a multiple of twice")
    (error,) = image_setting_errors(fine | {"teacher_patch_size": 0})
    assert error == "--teacher-patch-size 0: use 1 or more"
