"""What the VILA-U example trains on: scikit-image's photos, each to be read and to be drawn."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import photos
import tokenizer
from runs import Runs
from vila_u_tiny.random_tower import PRESET

from megatron_eve.config.presets import PRESETS
from megatron_eve.models.vila_u.templates import SPECIAL_TOKENS

DATASET_FLAGS = ("--family", "vila_u", "--code-grid", PRESETS[PRESET].vision.code_grid)
"""Of the preprocessing: all datasets are made for the preset."""
TOKENIZER_PIECES = PRESETS[PRESET].model.vocab_size - len(SPECIAL_TOKENS)
"""The control tokens around pictures are the last ids of the model's vocabulary, behind those of the tokenizer."""
TEMPLATE = "v1"
ASKED = "Describe the picture."
TEMPLATE_COPIES = 20
"""How often the tokenizer reads the words of the template, so that they are few pieces."""

Shown = tuple[str, str, str]
"""A picture: its name, its file name in `data/images`, and its sentence."""


def draw_row(name: str, image: str, sentence: str) -> dict[str, Any]:
    """A row in the LLaVA layout that asks with a sentence and answers with a picture."""
    turns = [{"from": "human", "value": sentence}, {"from": "gpt", "value": "<image>"}]
    return {"id": name, "image": image, "draw": True, "conversations": turns}


def read_row(name: str, image: str, sentence: str) -> dict[str, Any]:
    """A row in the LLaVA layout that asks about a picture and answers with a sentence."""
    turns = [{"from": "human", "value": f"<image>\n{ASKED}"}, {"from": "gpt", "value": sentence}]
    return {"id": name, "image": image, "conversations": turns}


def write_rows(shown: Iterable[Shown], target: Path) -> Path:
    """Write the rows of a dataset in which every picture is read and drawn, in the LLaVA layout; returns the file.

    Args:
        shown: pictures.
        target: the file.
    """
    rows = [row(*one) for one in shown for row in (read_row, draw_row)]
    target.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return target


def image_to_draw(number: int) -> int:
    """Where the drawn copy of a picture stands among the images of such a dataset; pictures counted from 0."""
    return 2 * number + 1


def export_photos(runs: Runs) -> list[Shown]:
    """Write the photos into `data/images`; returns them."""
    rows = json.loads(photos.export(runs.data).read_text(encoding="utf-8"))
    captions = photos.load_captions()
    return [(row["id"], row["image"], captions[row["id"]]) for row in rows]


def train_tokenizer(runs: Runs, sentences: Iterable[str]) -> None:
    """Train the tokenizer on sentences and the words of the template."""
    texts = [*sentences, *[tokenizer.TEMPLATE_TEXT] * TEMPLATE_COPIES]
    tokenizer.train(texts, runs.tokenizer, TOKENIZER_PIECES)


def make_dataset(runs: Runs, name: str, shown: Iterable[Shown], tower: Path, show: bool = False) -> None:
    """Make the dataset `data/NAME`, in which every picture is read and drawn, with the codes of a tower.

    Args:
        runs: the folder of the example, with the tokenizer.
        name: of the dataset.
        shown: pictures.
        tower: folder of the tower.
        show: show the commands.
    """
    runs.preprocess(name, write_rows(shown, runs.data / f"{name}.json"), TEMPLATE, show=show)
    runs.tool(
        "tools/tokenize_images.py", f"tokenize-{name}", "--tower", tower, "--input", runs.data / name,
        "--workers", 1, show=show,
    )  # fmt: skip
