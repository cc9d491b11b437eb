"""What the EVE v2 example trains on and asks: captions of scikit-image's photos, and questions about one and about two.

Questions about two photos come with the photos in either order: which is the first one, only the pixels say.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizer import TEMPLATE_TEXT
from vila_tiny.inputs import ALONE, FIRST, SECOND, caption_of, conversation, pairs

from megatron_eve.models.eve2.templates import EVE2_QWEN2

TEMPLATE = EVE2_QWEN2.name
MAX_IMAGE_SIDE = 96
DATASET_FLAGS = ("--family", "eve2", "--max-image-side", MAX_IMAGE_SIDE, "--image-resize", "scale")
"""Of the preprocessing. Pictures get their sizes by the rule of answers, as in the recipes."""
TEMPLATE_COPIES = 3
"""How often the tokenizer reads the words of the template and the questions, so that they are few tokens."""
CAPTIONED = ("chelsea", "coffee", "rocket")
"""The photos that the model captions at the end; the first of them it is also shown beside another one."""

Row = dict[str, Any]
"""A row in the LLaVA layout."""
SWAPPED = 2
"""Questions about two photos, which are asked again with the photos swapped."""

Learnt = tuple[list[str], str, str]
"""File names of photos, a question, and the answer of the training data."""


def texts(captions: Sequence[Row]) -> list[str]:
    """What the tokenizer is trained on."""
    return [*map(caption_of, captions), *[TEMPLATE_TEXT, ALONE, FIRST, SECOND] * TEMPLATE_COPIES]


def questions(captions: Sequence[Row]) -> list[Row]:
    """Conversations about each photo alone, and about pairs of photos in both orders."""
    rows = [conversation([row], ALONE, row) for row in captions]
    for one, other in pairs(captions):
        rows += [conversation(shown, text, answer) for shown, text, answer in _about_two(one, other)]
    return rows


def write_questions(captions: Path, target: Path) -> Path:
    """Write the conversations of a file of captions; returns the file."""
    rows = questions(json.loads(captions.read_text(encoding="utf-8")))
    target.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return target


def learnt(captions: Sequence[Row]) -> list[Learnt]:
    """What the model is asked at the end: three captions, then two questions about two photos, in both orders."""
    rows = {row["id"]: row for row in captions}
    one, other = next(pair for pair in pairs(captions) if pair[0]["id"] == CAPTIONED[0])
    asked = [([rows[photo]], ALONE, rows[photo]) for photo in CAPTIONED]
    asked += _about_two(one, other)
    return [([row["image"] for row in shown], text, caption_of(answer)) for shown, text, answer in asked]


def _about_two(one: Row, other: Row) -> list[tuple[list[Row], str, Row]]:
    """Photos, question and answer: which of two photos is the first and which the second, in both orders."""
    return [
        ([one, other], FIRST, one), ([one, other], SECOND, other),
        ([other, one], FIRST, other), ([other, one], SECOND, one),
    ]  # fmt: skip
