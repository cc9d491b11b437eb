"""Pictures of one coloured shape, and conversations about one of them and about two, for the picture experiment.

Colour, shape, place, size and background are random. Some combinations of colour and shape are in no picture that is
trained on, so that a model can be asked about them.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SIDE = 112
"""Of a picture, in pixels: that of the preset's tower."""
SMALLEST, LARGEST = 44, 76
"""Sides of a shape, in pixels."""
PALEST, DARKEST = 255, 150
"""Of the three channels of a background."""
COLOURS = {"red": (205, 30, 30), "green": (25, 140, 50), "blue": (35, 55, 205), "yellow": (235, 195, 0)}
SHAPES = ("circle", "square", "triangle", "cross")
HELD_OUT = frozenset(zip(COLOURS, SHAPES, strict=True))
"""Combinations that are in no picture that is trained on: each colour and each shape is in one of them."""
ALL = tuple(itertools.product(COLOURS, SHAPES))
SEEN = tuple(pair for pair in ALL if pair not in HELD_OUT)
GREY = "grey.png"

COLOUR, SHAPE = "Which colour?", "Which shape?"
ORDINALS = ("first", "second")


@dataclass(frozen=True)
class Picture:
    """A picture and what it shows.

    Attributes:
        name: file name.
        colour, shape: of what it shows.
    """

    name: str
    colour: str
    shape: str

    @property
    def caption(self) -> str:
        """What it shows, in words."""
        return f"a {self.colour} {self.shape}"


def asked_of(ordinal: str) -> str:
    """The question about the first or the second of two pictures."""
    return f"What does the {ordinal} picture show?"


def draw(kind: str, count: int, combinations: Sequence[tuple[str, str]], folder: Path) -> list[Picture]:
    """Draw pictures, each combination equally often, into `folder`; another `kind` gives other draws."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number in range(count):
        colour, shape = combinations[number % len(combinations)]
        made.append(Picture(f"{kind}_{number}.png", colour, shape))
        picture(colour, shape, random.Random(made[-1].name)).save(folder / made[-1].name, compress_level=1)
    return made


def draw_grey(folder: Path) -> None:
    """Draw the picture that shows nothing."""
    Image.new("RGB", (SIDE, SIDE), (128, 128, 128)).save(folder / GREY)


def picture(colour: str, shape: str, choose: random.Random) -> Image.Image:
    """One picture, [SIDE, SIDE, 3], with size, place and background of `choose`."""
    background = tuple(choose.randint(DARKEST, PALEST) for _ in range(3))
    side = choose.randint(SMALLEST, LARGEST)
    left, top = choose.randint(0, SIDE - 1 - side), choose.randint(0, SIDE - 1 - side)
    return placed(colour, shape, left, top, side, background)


def placed(
    colour: str, shape: str, left: int, top: int, side: int, background: tuple[int, ...] = (255, 255, 255)
) -> Image.Image:
    """One picture, [SIDE, SIDE, 3], of a shape at a place; `left`, `top` and `side` in pixels."""
    image = Image.new("RGB", (SIDE, SIDE), background)
    pen, fill = ImageDraw.Draw(image), COLOURS[colour]
    right, bottom, third = left + side, top + side, side // 3
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill)
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), fill)
    elif shape == "triangle":
        pen.polygon(((left, bottom), (right, bottom), ((left + right) // 2, top)), fill)
    else:
        pen.rectangle((left + third, top, right - third, bottom), fill)
        pen.rectangle((left, top + third, right, bottom - third), fill)
    return image


def write_captions(pictures: Sequence[Picture], target: Path) -> Path:
    """Captions in the LLaVA layout; returns the file."""
    return _write([_row([one], [("Describe the picture.", one.caption)]) for one in pictures], target)


def write_conversations(pictures: Sequence[Picture], target: Path) -> Path:
    """For each picture two conversations in the LLaVA layout, one about it alone and one about it and another.

    Each asks both questions, in either order. Returns the file.
    """
    choose, rows = random.Random(0), []
    for one in pictures:
        turns = [(COLOUR, one.colour), (SHAPE, one.shape)]
        rows.append(_row([one], choose.sample(turns, 2)))
        two = [one, choose.choice(pictures)]
        turns = [(asked_of(name), which.caption) for name, which in zip(ORDINALS, two, strict=True)]
        rows.append(_row(two, choose.sample(turns, 2)))
    return _write(rows, target)


def texts() -> list[str]:
    """All that is asked and answered."""
    return [COLOUR, SHAPE, *map(asked_of, ORDINALS), *(f"a {colour} {shape}" for colour, shape in ALL)]


def _row(pictures: Sequence[Picture], turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    said = [
        {"from": sender, "value": text}
        for turn in turns
        for sender, text in zip(("human", "gpt"), turn, strict=True)
    ]
    said[0]["value"] = "<image>\n" * len(pictures) + said[0]["value"]
    names = [one.name for one in pictures]
    return {"id": "-".join(names), "image": names if len(names) > 1 else names[0], "conversations": said}


def _write(rows: Sequence[dict[str, Any]], target: Path) -> Path:
    target.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return target
