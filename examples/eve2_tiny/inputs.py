"""What the EVE v2 example trains on and asks: captions of scikit-image's photos, and two questions about each.

A question is the same for all photos, so only the pixels say which answer is right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizer import TEMPLATE_TEXT
from vila_tiny.inputs import caption_of, conversation

from megatron_eve.models.eve2.templates import EVE2_QWEN2

TEMPLATE = EVE2_QWEN2.name
MAX_IMAGE_SIDE = 96
DATASET_FLAGS = ("--family", "eve2", "--max-image-side", MAX_IMAGE_SIDE, "--image-resize", "scale")
"""Of the preprocessing. Pictures get their sizes by the rule of answers, as in the recipes."""
TEMPLATE_COPIES = 3
"""How often the tokenizer reads the words of the template and the questions, so that they are few tokens."""
QUESTIONS = ("Describe the picture.", "What is shown in the image?")
ASKED = ("chelsea", "coffee", "rocket")
"""The photos that the model is asked about at the end."""

Row = dict[str, Any]
"""A row in the LLaVA layout."""
SWAPPED = 2
"""Questions that are asked again at the end, each with the photo of the other."""

Learnt = tuple[list[str], str, str]
"""File names of photos, a question, and the answer of the training data."""


def texts(captions: Sequence[Row]) -> list[str]:
    """What the tokenizer is trained on."""
    return [*map(caption_of, captions), *[TEMPLATE_TEXT, *QUESTIONS] * TEMPLATE_COPIES]


def questions(captions: Sequence[Row]) -> list[Row]:
    """Conversations about each photo, one for each question."""
    return [conversation([row], text, row) for row in captions for text in QUESTIONS]


def write_questions(captions: Path, target: Path) -> Path:
    """Write the conversations of a file of captions; returns the file."""
    rows = questions(json.loads(captions.read_text(encoding="utf-8")))
    target.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return target


def learnt(captions: Sequence[Row]) -> list[Learnt]:
    """What the model is asked at the end: about each photo of `ASKED`, and about the first two with photos swapped."""
    rows = {row["id"]: row for row in captions}
    texts = [QUESTIONS[place % len(QUESTIONS)] for place in range(len(ASKED))]
    shown = [*ASKED, ASKED[1], ASKED[0]]
    asked = zip(shown, [*texts, *texts[:SWAPPED]], strict=True)
    return [([rows[photo]["image"]], text, caption_of(rows[photo])) for photo, text in asked]
