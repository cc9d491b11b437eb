"""Crops of the quickstart's photos, each with the sentence of its photo."""

from __future__ import annotations

import numpy as np
import photos
from PIL import Image
from vila_u_tiny.pairs import SIDE, Pair, Pixels

SMALLEST = 0.6
"""Side of a crop, as a share of the photo's shorter side."""


def photo_crops(count: int, seed: int) -> list[Pair]:
    """So many random square crops of each photo, all of one photo behind each other."""
    generator = np.random.default_rng(seed)
    found = []
    for name, sentence in photos.load_captions().items():
        image = _photo(name)
        for number in range(count):
            side = int(min(image.size) * generator.uniform(SMALLEST, 1))
            left, top = (int(generator.integers(0, length - side + 1)) for length in image.size)
            found.append(Pair(f"{name}-{number}", _cut(image, left, top, side), sentence))
    return found


def photo_centres() -> list[Pair]:
    """The largest square in the middle of each photo."""
    found = []
    for name, sentence in photos.load_captions().items():
        image = _photo(name)
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        found.append(Pair(name, _cut(image, left, top, side), sentence))
    return found


def _photo(name: str) -> Image.Image:
    with Image.open(photos.find(name)) as image:
        return image.convert("RGB")


def _cut(image: Image.Image, left: int, top: int, side: int) -> Pixels:
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
