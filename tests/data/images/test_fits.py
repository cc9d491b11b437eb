"""Pictures that become squares: the bytes of the published code, without its giant intermediates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_eve.data.images.backends import placeholder_image
from megatron_eve.data.images.resizing import columns_come_first, enlarges, fitted, resize
from megatron_eve.models.family import View

COLOUR = (122, 116, 104)
Fit = Literal["stretch", "pad", "crop"]
FITS: tuple[Fit, ...] = ("stretch", "pad", "crop")


def square(side: int, fit: Fit) -> View:
    return View(side, side, COLOUR, fit=fit, pass_order="pillow13")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_pillow_13(image: Image.Image, width: int, height: int) -> Image.Image:
    """One `resize` of Pillow 13."""
    columns_first = columns_come_first(image.size, (width, height))
    return Image.fromarray(resize(image, width, height, columns_first))


def published(image: Image.Image, side: int, fit: Fit) -> np.ndarray:
    """As the published code has it: LLaVA's expand2square, and CLIP's processor of transformers 4.36."""
    width, height = image.size
    if fit == "pad" and width != height:
        longer = max(width, height)
        canvas = Image.new("RGB", (longer, longer), COLOUR)
        canvas.paste(image, ((longer - width) // 2, (longer - height) // 2))
        image = canvas
    if fit != "crop":
        return np.asarray(as_pillow_13(image, side, side))
    longer = int(side * max(image.size) / min(image.size))
    new_width, new_height = (side, longer) if width <= height else (longer, side)
    left, top = (new_width - side) // 2, (new_height - side) // 2
    return np.asarray(as_pillow_13(image, new_width, new_height).crop((left, top, left + side, top + side)))


@pytest.mark.parametrize("fit", FITS)
@settings(deadline=None, max_examples=40)
@given(short=st.integers(1, 90), ratio=st.floats(1, 20), tall=st.booleans(), side=st.integers(1, 60))
@example(short=240, ratio=4 / 3, tall=True, side=56)
@example(short=60, ratio=20, tall=True, side=28)
@example(short=60, ratio=20, tall=False, side=28)
@example(short=1, ratio=20, tall=True, side=56)
@example(short=56, ratio=1, tall=True, side=56)
def test_bytes_are_the_published_ones(short: int, ratio: float, tall: bool, side: int, fit: Fit) -> None:
    longer = int(short * ratio)
    image = noise(*((short, longer) if tall else (longer, short)))
    found = fitted(image, square(side, fit))
    assert found.shape == (side, side, 3) and found.dtype == np.uint8
    assert found.flags.writeable and found.flags.c_contiguous
    assert (found == published(image, side, fit)).all()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(1, 700), (700, 1), (30, 2000), (2000, 30)])
def test_long_pictures_whose_sides_divide_keep_their_bytes_too(size: tuple[int, int], fit: Fit) -> None:
    image = noise(*size)
    assert (fitted(image, square(24, fit)) == published(image, 24, fit)).all()


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("size", [(31, 5003), (5003, 31)])
def test_longer_pictures_are_close(size: tuple[int, int], fit: Fit) -> None:
    """Of a smooth picture, since the pixels of noise have nothing in common with their neighbours."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    image = Image.fromarray(
        np.stack([(x + y) // 40 % 256, x // 40 % 200, y // 40 % 180], -1).astype(np.uint8)
    )
    found, expected = (one.astype(int) for one in (fitted(image, square(24, fit)), published(image, 24, fit)))
    assert abs(found - expected).max() <= 1


EXTREME = """
import resource, sys
import numpy as np
from PIL import Image
from megatron_eve.data.images.resizing import fitted
from megatron_eve.models.family import View
for width, height in ((1, 1000), (1000, 1), (20000, 20), (20, 20000), (400_000, 2), (2, 400_000)):
    image = Image.new("RGB", (width, height), (200, 30, 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for fit in ("pad", "crop", "stretch"):
        found = fitted(image, View(336, 336, (0, 0, 0), fit=fit, pass_order="pillow13"))
        assert found.shape == (336, 336, 3)
        if fit != "pad":
            assert (found == (200, 30, 20)).all()
        else:
            assert found[168, 168, 0] > 0 or min(width, height) < 20
            assert not found[0, -1].any() and not found[-1, 0].any()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000, f"{width} x {height}: {grown} kB"
"""


def test_extreme_pictures_take_little_memory() -> None:
    """1 x 1000 would be 336 x 336,000 pixels before it is cropped, and 20,000 x 20 a square of 1.6 GB when padded."""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", EXTREME], capture_output=True, text=True, check=False, cwd=root, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_damaged_picture_is_the_colour_of_the_margins() -> None:
    assert (placeholder_image(square(8, "pad")).numpy() == COLOUR).all()


@pytest.mark.parametrize(
    ("fit", "smaller"), [("pad", {(336, 20), (400, 400)}), ("crop", {(400, 400)}), ("stretch", {(400, 400)})]
)
def test_what_is_enlarged(fit: Fit, smaller: set[tuple[int, int]]) -> None:
    sizes = {(336, 20), (400, 400), (335, 335)}
    assert {size for size in sizes if not enlarges(square(336, fit), *size)} == smaller
