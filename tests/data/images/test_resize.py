"""Resized pictures have the bytes of Pillow's releases before 13, whatever release is installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import pytest
from numpy.typing import NDArray
from PIL import Image

from megatron_eve.data.images import resize

PUBLISHED = "dc0393f15e9a4a9f8f0b8146b02b0d6178a475b6bcaf5586fee3697566042065"
"""sha256 of what Pillow 12.3 makes of `pictures` in one step; 13.0 makes something else of some of them."""


def pictures() -> list[tuple[Image.Image, int, int]]:
    """300 pictures of noise with the width and height to resize them to; sides of 8 to 500 pixels."""
    random = np.random.default_rng(5)
    sizes = [[int(side) for side in np.exp(random.uniform(np.log(8), np.log(500), 4))] for _ in range(300)]
    random = np.random.default_rng(6)
    return [
        (Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)), *new)
        for width, height, *new in sizes
    ]  # fmt: skip


def digest(resized: Callable[[Image.Image, int, int], NDArray[np.uint8]]) -> str:
    """sha256 of all of them."""
    found = hashlib.sha256()
    for image, width, height in pictures():
        found.update(resized(image, width, height).tobytes())
    return found.hexdigest()


def in_one_step(image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    """As Pillow does it by itself."""
    return np.asarray(image.resize((width, height)))


def columns_first(image: Image.Image, width: int, height: int) -> bool:
    """Where Pillow 13 resizes the columns first."""
    return height < image.height and image.height - height > 2 * (image.width - width)


def test_bytes_are_those_of_the_published_preprocessing() -> None:
    affected = sum(columns_first(*one) for one in pictures())
    assert 50 < affected < 250  # both ways are tried
    assert digest(resize) == PUBLISHED


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) >= 13, reason="this Pillow does it otherwise")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((300, 200), (300, 56)), ((300, 200), (300, 400)), ((300, 200), (56, 200)), ((300, 200), (600, 200)),
        ((300, 200), (300, 200)), ((1, 1), (56, 56)), ((1, 1000), (28, 672)), ((1000, 1), (672, 28)),
        ((2000, 1500), (56, 42)), ((37, 480), (56, 672)), ((113, 112), (112, 112)), ((3000, 20), (672, 28)),
    ],
)  # fmt: skip
def test_two_steps_are_one_step_of_the_releases_before(old: tuple[int, int], new: tuple[int, int]) -> None:
    """Also where one side stays, where both do, and far down, where the filter takes in many pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (old[1], old[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found = resize(image, *new)
    assert (found == in_one_step(image, *new)).all()
    assert found.flags.writeable and found.flags.c_contiguous
    assert (np.asarray(image) == pixels).all()


@pytest.mark.slow
def test_bytes_under_pillow_13(tmp_path: Path) -> None:
    """The same with that release, in a folder of its own."""
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "-t",
        str(tmp_path),
        "pillow==13.0.0",
    ]
    if subprocess.run(install, capture_output=True, check=False).returncode:
        pytest.skip("Pillow 13 cannot be fetched here")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import PIL\n"
        "from megatron_eve.data.images import resize\n"
        "from tests.data.images.test_resize import digest, in_one_step\n"
        "print(PIL.__version__, digest(resize), digest(in_one_step))"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root, timeout=300
    )
    version, ours, one_step = done.stdout.split()
    assert version == "13.0.0" and ours == PUBLISHED and one_step != PUBLISHED
