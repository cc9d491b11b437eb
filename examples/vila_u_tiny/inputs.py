"""What the VILA-U example trains on: scikit-image's photos, each to be read and to be drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vila_u_tiny.tower import PRESET

from megatron_eve.config.presets import PRESETS
from megatron_eve.models.vila_u.templates import SPECIAL_TOKENS

DATASET_FLAGS = ("--family", "vila_u", "--code-grid", PRESETS[PRESET].vision.code_grid)
"""Of the preprocessing: all datasets are made for the preset."""
TOKENIZER_PIECES = PRESETS[PRESET].model.vocab_size - len(SPECIAL_TOKENS)
"""The control tokens around pictures are the last ids of the model's vocabulary, behind those of the tokenizer."""
TEMPLATE = "v1"
ASKED = "Describe the picture."


def draw_row(name: str, image: str, sentence: str) -> dict[str, Any]:
    """A row in the LLaVA layout that asks with a sentence and answers with a picture."""
    turns = [{"from": "human", "value": sentence}, {"from": "gpt", "value": "<image>"}]
    return {"id": name, "image": image, "draw": True, "conversations": turns}


def read_row(name: str, image: str, sentence: str) -> dict[str, Any]:
    """A row in the LLaVA layout that asks about a picture and answers with a sentence."""
    turns = [{"from": "human", "value": f"<image>\n{ASKED}"}, {"from": "gpt", "value": sentence}]
    return {"id": name, "image": image, "conversations": turns}


def write_rows(shown: list[tuple[str, str, str]], target: Path) -> Path:
    """Write the rows of a dataset in which every picture is read and drawn, in the LLaVA layout; returns the file.

    Args:
        shown: pictures, each with its name, its file name, and its sentence.
        target: the file.
    """
    rows = [row(*one) for one in shown for row in (read_row, draw_row)]
    target.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return target


def image_to_draw(number: int) -> int:
    """Where the drawn copy of a picture stands among the images of such a dataset; pictures counted from 0."""
    return 2 * number + 1
