"""Pictures of coloured shapes, and questions about one picture and about the first and the second of two.

Four colours times four shapes are sixteen combinations. Four of them, one of each colour and of each shape, are held
out: no picture that is trained on shows them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw
from vila_tiny.inputs import FIRST, SECOND
from vila_tiny.runs import Question

COLOURS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 210), "yellow": (230, 200, 40)}
SHAPES = ("circle", "square", "triangle", "cross")
COMBINATIONS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT = tuple(zip(COLOURS, SHAPES, strict=True))
TRAINED = tuple(pair for pair in COMBINATIONS if pair not in HELD_OUT)

ALONE = "What does the picture show?"
SIDE = 112
GREY = "grey.png"


class Shape(NamedTuple):
    """A picture.

    Attributes:
        file: its name.
        colour, shape: what it shows.
    """

    file: str
    colour: str
    shape: str

    @property
    def answer(self) -> str:
        """What is to be said of it."""
        return f"A {self.colour} {self.shape}."


def make(
    combinations: Sequence[tuple[str, str]], count: int, seed: int, prefix: str, folder: Path
) -> list[Shape]:
    """Draw pictures.

    Args:
        combinations: of colour and shape.
        count: pictures of each.
        seed: of places, sizes and backgrounds.
        prefix: of the file names.
        folder: gets the files.

    Returns:
        The pictures, all combinations in turns.
    """
    place, made = random.Random(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        for colour, shape in combinations:
            file = f"{prefix}_{colour}_{shape}_{number}.png"
            _picture(colour, shape, place).save(folder / file)
            made.append(Shape(file, colour, shape))
    return made


def make_grey(folder: Path) -> str:
    """Draw the picture that shows nothing; returns its name."""
    Image.new("RGB", (SIDE, SIDE), (128, 128, 128)).save(folder / GREY)
    return GREY


def _picture(colour: str, shape: str, place: random.Random) -> Image.Image:
    shade = place.randint(110, 255)
    image = Image.new("RGB", (SIDE, SIDE), (shade, shade, shade))
    size = place.randint(50, 80)
    left, top = place.randint(0, SIDE - size), place.randint(0, SIDE - size)
    right, bottom, third = left + size, top + size, size // 3
    draw, fill = ImageDraw.Draw(image), COLOURS[colour]
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=fill)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=fill)
    elif shape == "triangle":
        draw.polygon(((left, bottom), (right, bottom), ((left + right) // 2, top)), fill=fill)
    else:
        draw.rectangle((left + third, top, right - third, bottom), fill=fill)
        draw.rectangle((left, top + third, right, bottom - third), fill=fill)
    return image


def alone(pictures: Sequence[Shape]) -> list[Question]:
    """A question about each picture."""
    return [Question([one.file], ALONE, one.answer) for one in pictures]


def pairs(pictures: Sequence[Shape], count: int, seed: int) -> list[tuple[Shape, Shape]]:
    """Pairs of pictures of which the answers differ."""
    draw = random.Random(seed)
    found: list[tuple[Shape, Shape]] = []
    while len(found) < count:
        one, other = draw.sample(list(pictures), 2)
        if one.answer != other.answer:
            found.append((one, other))
    return found


def about(one: Shape, other: Shape) -> tuple[Question, Question]:
    """The questions about the first and about the second of two pictures."""
    files = [one.file, other.file]
    return Question(files, FIRST, one.answer), Question(files, SECOND, other.answer)


def write_conversations(questions: Sequence[Question], target: Path) -> Path:
    """Write questions with their answers in the LLaVA layout."""
    rows: list[dict[str, Any]] = [
        {
            "id": str(number),
            "image": list(one.pictures) if len(one.pictures) > 1 else one.pictures[0],
            "conversations": [
                {"from": "human", "value": "<image>\n" * len(one.pictures) + one.text},
                {"from": "gpt", "value": one.right},
            ],
        }
        for number, one in enumerate(questions)
    ]
    target.write_text(json.dumps(rows), encoding="utf-8")
    return target
