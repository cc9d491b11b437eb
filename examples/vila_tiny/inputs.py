"""What the VILA example trains on: scikit-image's photos with captions, and a vision tower with random weights.

Four datasets come of the same two dozen photos: captions, documents with two photos each between their sentences (in
MMC4's layout), conversations about one photo and about two, and conversations without any.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_eve.config.presets import PRESETS

PRESET = "vila_tiny"
_VISION = PRESETS[PRESET].vision
DATASET_FLAGS = (
    "--family", "vila", "--image-size", _VISION.image_size, "--vision-patch-size", _VISION.vision_patch_size,
)  # fmt: skip
"""Of the preprocessing: all datasets are made for the preset."""

NEXT = 7
"""A photo stands with the one so many places behind it."""

FIRST, SECOND = "What does the first picture show?", "What does the second picture show?"
ALONE = "Describe the picture."

# Conversations without a picture, so that the language model keeps its own trade.
TEXT = (
    ("What do bees make?", "Bees make honey and wax."),
    ("How many days has a week?", "A week has seven days."),
    ("Where does the sun rise?", "The sun rises in the east."),
    ("What is ice made of?", "Ice is frozen water."),
    ("Which season follows winter?", "Spring follows winter."),
    ("What do cows eat?", "Cows eat grass."),
    ("How many legs has a spider?", "A spider has eight legs."),
    ("What is bread baked from?", "Bread is baked from flour, water and yeast."),
)


def save_tower(folder: Path) -> Path:
    """Save a seeded random vision tower of the preset's sizes in Hugging Face layout; returns the folder."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=_VISION.vision_hidden_size,
        intermediate_size=_VISION.vision_ffn_hidden_size,
        num_hidden_layers=_VISION.vision_num_layers,
        num_attention_heads=_VISION.vision_num_attention_heads,
        image_size=_VISION.image_size,
        patch_size=_VISION.vision_patch_size,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


def pairs(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each photo with another one."""
    return [(row, rows[(place + NEXT) % len(rows)]) for place, row in enumerate(rows)]


def caption_of(row: dict[str, Any]) -> str:
    """The caption of a row in the LLaVA layout."""
    text: str = row["conversations"][-1]["value"]
    return text


def photo_rows(captions: Path) -> list[tuple[str, Path, str]]:
    """The datasets with photos: for each its name, a file of rows that lies beside `captions`, and the template."""
    folder = captions.parent
    return [
        ("captions", captions, "plain"),
        ("documents", write_documents(captions, folder / "docs_shard_0_v3.jsonl"), "document"),
        ("conversations", write_conversations(captions, folder / "conversations.json"), "vila_v1"),
    ]


def write_documents(captions: Path, target: Path) -> Path:
    """Documents of two photos in MMC4's layout: each photo is matched to the sentence that tells of it."""
    lines = []
    for one, other in pairs(json.loads(captions.read_text(encoding="utf-8"))):
        pictures = [
            {"image_name": row["image"], "matched_text_index": place}
            for place, row in enumerate((one, other))
        ]
        lines.append({"text_list": [caption_of(one), caption_of(other)], "image_info": pictures})
    target.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return target


def write_conversations(captions: Path, target: Path) -> Path:
    """Questions about one photo, and about the first and the second of two, in the LLaVA layout."""
    rows = json.loads(captions.read_text(encoding="utf-8"))
    made = [conversation([row], ALONE, row) for row in rows]
    for one, other in pairs(rows):
        made += [conversation([one, other], FIRST, one), conversation([one, other], SECOND, other)]
    target.write_text(json.dumps(made, indent=1), encoding="utf-8")
    return target


def write_text(target: Path) -> Path:
    """The conversations without a picture, in the LLaVA layout."""
    rows = [
        {"id": str(i), "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]}
        for i, (asked, answer) in enumerate(TEXT)
    ]
    target.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return target


def write_sentences(target: Path) -> Path:
    """The answers of these conversations as text, a line of JSON each."""
    lines = [json.dumps({"text": f"{asked} {answer}"}) for asked, answer in TEXT]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def conversation(photos: list[dict[str, Any]], question: str, shown: dict[str, Any]) -> dict[str, Any]:
    """A question in the LLaVA layout about photos, which are rows of captions; the caption of `shown` answers it."""
    names = [photo["image"] for photo in photos]
    turns = [
        {"from": "human", "value": "<image>\n" * len(names) + question},
        {"from": "gpt", "value": caption_of(shown)},
    ]
    return {
        "id": "-".join([*(photo["id"] for photo in photos), shown["id"]]),
        "image": names if len(names) > 1 else names[0],
        "conversations": turns,
    }
