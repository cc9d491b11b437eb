"""Toy English for the text experiment: sentences of a small grammar, and sums in words.

Both have something to forget: which adjectives, places and foods go with an animal, and what two numbers add up to.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SENTENCES_OF_A_TEXT = 4

# Animals of a kind share adjectives, places and food.
KINDS = (
    (
        ("whale", "seal", "shark"),
        ("wet", "smooth", "deep"),
        ("in the sea", "near the coast"),
        ("fish", "krill"),
    ),
    (
        ("owl", "robin", "crow"),
        ("feathered", "light", "loud"),
        ("in the air", "on a branch"),
        ("worms", "seeds"),
    ),
    (
        ("cow", "goat", "horse"),
        ("gentle", "brown", "heavy"),
        ("in the field", "on the farm"),
        ("grass", "hay"),
    ),
    (
        ("fox", "wolf", "bear"),
        ("wild", "quick", "grey"),
        ("in the forest", "in the hills"),
        ("meat", "berries"),
    ),
)
TIMES = ("every morning", "at noon", "at night", "in spring")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
           "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen")  # fmt: skip
LARGEST_ADDEND = 9


def sentence(draw: random.Random) -> str:
    """A sentence of the grammar."""
    animals, adjectives, places, food = draw.choice(KINDS)
    animal, adjective, place = draw.choice(animals), draw.choice(adjectives), draw.choice(places)
    return f"The {adjective} {animal} eats {draw.choice(food)} {place} {draw.choice(TIMES)}."


def total(draw: random.Random) -> str:
    """A sum in words."""
    one, other = draw.randint(0, LARGEST_ADDEND), draw.randint(0, LARGEST_ADDEND)
    return f"{NUMBERS[one].capitalize()} plus {NUMBERS[other]} is {NUMBERS[one + other]}."


TEXTS = {"sentences": sentence, "sums": total}
"""What makes a sentence of each dataset, by the name of the dataset."""


def write(name: str, count: int, seed: int, target: Path) -> list[str]:
    """Write texts of a dataset as JSON lines; returns them.

    Args:
        name: of the dataset.
        count: texts, each of four sentences.
        seed: other seeds give other texts of the same kind.
        target: the file.
    """
    draw = random.Random(f"{name} {seed}")
    texts = [" ".join(TEXTS[name](draw) for _ in range(SENTENCES_OF_A_TEXT)) for _ in range(count)]
    target.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return texts
