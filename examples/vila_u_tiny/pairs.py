"""Pairs of a picture and a sentence for the toy towers: how they are kept, varied and written as a dataset's rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 64
"""Of a picture, in pixels."""
MOST_SHIFT = 8
"""Pixels by which a variant may be moved."""
WHITE = (255, 255, 255)

Pixels = NDArray[np.uint8]
"""A picture, [SIDE, SIDE, 3]."""


@dataclass(frozen=True)
class Pair:
    """A picture and its sentence.

    Attributes:
        name: of the picture, without blanks.
        pixels: uint8 [SIDE, SIDE, 3].
        sentence: about it, in English.
    """

    name: str
    pixels: Pixels
    sentence: str


def square(image: Image.Image) -> Pixels:
    """An image in the middle of a white square, `SIDE` pixels wide; what is transparent becomes white."""
    opaque, side = image.convert("RGBA"), max(image.size)
    below = Image.new("RGBA", (side, side), (*WHITE, 255))
    below.alpha_composite(opaque, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(below.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def varied(pixels: Pixels, generator: np.random.Generator) -> Pixels:
    """A picture on white, mirrored or not, and moved by up to `MOST_SHIFT` pixels each way."""
    if generator.random() < 0.5:
        pixels = pixels[:, ::-1]
    padding = ((MOST_SHIFT, MOST_SHIFT), (MOST_SHIFT, MOST_SHIFT), (0, 0))
    wide = np.pad(pixels, padding, constant_values=WHITE[0])
    row, column = generator.integers(0, 2 * MOST_SHIFT + 1, 2)
    return np.ascontiguousarray(wide[row : row + SIDE, column : column + SIDE])


def variants(pairs: Iterable[Pair], count: int, seed: int) -> list[Pair]:
    """Each pair `count` times, the first as it is and the others `varied`."""
    generator = np.random.default_rng(seed)
    return [
        Pair(
            f"{pair.name}-{number}", varied(pair.pixels, generator) if number else pair.pixels, pair.sentence
        )
        for pair in pairs
        for number in range(count)
    ]


def write_pairs(pairs: Sequence[Pair], images: Path, target: Path) -> Path:
    """Write pictures as PNG files and their rows in the LLaVA layout.

    Args:
        pairs: with names of their own.
        images: folder of the pictures.
        target: JSON file of the rows.

    Returns:
        The file.
    """
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for pair in pairs:
        Image.fromarray(pair.pixels).save(images / f"{pair.name}.png")
        turns = [
            {"from": "human", "value": "<image>\nDescribe the picture."},
            {"from": "gpt", "value": pair.sentence},
        ]
        rows.append({"id": pair.name, "image": f"{pair.name}.png", "conversations": turns})
    target.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return target
