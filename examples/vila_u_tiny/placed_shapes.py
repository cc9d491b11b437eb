"""Made pictures for the memory experiment: one coloured shape at one of nine places, and the sentence that says so.

A picture is a function of its sentence. Some combinations of colour and shape are in no picture that is trained on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from vila_tiny import shapes

SIDE = 56
"""Of a shape, in pixels; that of the picture is `shapes.SIDE`."""
_STEPS = (2, 28, 53)
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
PLACES = {
    f"{row} {column}": (left, top)
    for (row, top), (column, left) in itertools.product(
        zip(_ROWS, _STEPS, strict=True), zip(_COLUMNS, _STEPS, strict=True)
    )
}
"""Left and top edge of the shape, in pixels, by the name of the place."""


@dataclass(frozen=True)
class PlacedShape:
    """What a picture shows.

    Attributes:
        colour, shape: a combination of `shapes.ALL`.
        place: one of `PLACES`.
    """

    colour: str
    shape: str
    place: str

    @property
    def sentence(self) -> str:
        """What it shows, in words."""
        return f"a {self.colour} {self.shape}, {self.place}"

    @property
    def name(self) -> str:
        """Of its file, without the ending."""
        return f"{self.colour}_{self.shape}_{self.place.replace(' ', '_')}"

    @property
    def held_out(self) -> bool:
        """Is its combination of colour and shape in no picture that is trained on?"""
        return (self.colour, self.shape) in shapes.HELD_OUT


ALL = tuple(PlacedShape(colour, shape, place) for colour, shape in shapes.ALL for place in PLACES)
"""All of them, 16 combinations at 9 places."""


def save_pictures(folder: Path) -> list[tuple[str, str, str]]:
    """Write all pictures as PNG files; returns name, file name and sentence of each, in the order of `ALL`."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for one in ALL:
        left, top = PLACES[one.place]
        file = f"{one.name}.png"
        shapes.placed(one.colour, one.shape, left, top, SIDE).save(folder / file)
        shown.append((one.name, file, one.sentence))
    return shown


@dataclass(frozen=True)
class Score:
    """Shares of right answers, 0 to 1; at chance 1/4, 1/4 and 1/16.

    Attributes:
        count: how many were judged.
        colour, shape, both: shares in which these were right.
    """

    count: int
    colour: float
    shape: float
    both: float


def score(found: Sequence[tuple[PlacedShape, tuple[str, str]]]) -> Score:
    """Score colours and shapes that were found, each with what was asked for."""
    colour = [asked.colour == seen for asked, (seen, _) in found]
    shape = [asked.shape == seen for asked, (_, seen) in found]
    both = [one and other for one, other in zip(colour, shape, strict=True)]
    count = len(found)
    return Score(count, sum(colour) / count, sum(shape) / count, sum(both) / count)


def named(answer: str) -> tuple[str, str]:
    """Colour and shape that an answer names; "" for what it does not name, or names twice."""
    words = answer.replace(",", " ").split()
    found = []
    for known in (tuple(shapes.COLOURS), shapes.SHAPES):
        some = [word for word in words if word in known]
        found.append(some[0] if len(some) == 1 else "")
    return found[0], found[1]


def nearest_combination(
    drawn: NDArray[np.float32], true: dict[PlacedShape, NDArray[np.float32]], place: str
) -> tuple[str, str]:
    """Colour and shape of the true picture at a place that a drawing is nearest to.

    Args:
        drawn: [h, w, F], sums of the codebook vectors of the drawing's codes.
        true: the same of all pictures.
        place: that was asked for.
    """
    there = [one for one in true if one.place == place]
    best = min(there, key=lambda one: float(np.square(true[one] - drawn).sum()))
    return best.colour, best.shape
