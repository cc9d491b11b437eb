"""Small pictures, rows and datasets for the tests of `data`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_eve.data.format.indexed import (
    DatasetInfo,
    DatasetSettings,
    DatasetWriter,
    IndexedVisionDataset,
    StoredImage,
)
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig, preprocess
from megatron_eve.models.family import ImagePlanner
from megatron_eve.models.model_parts import ImageShare
from megatron_eve.models.registry import find_family

ROOT = Path(__file__).resolve().parents[2]
MakeConfig = Callable[..., PreprocessConfig]
# Of datasets that are written without preprocessing, for the model `eve_mini`.
MINI_SETTINGS = DatasetSettings(
    template="plain",
    family="eve",
    image_settings={"image_size": 224, "teacher_size": 112},
    model_max_length=2048,
    apply_exif=False,
    max_pixels=1 << 20,
    tokenizer_sha256="ab" * 32,
    vocab_size=384,
)
# What a rank decodes that embeds the patches of all images and shows all of them to the teacher.
ALL_VIEWS: dict[str, Any] = {"views": ["patches"], "shared_views": ["teacher"], "share": ImageShare(0, 1)}


def planner(image_size: int = 224, teacher_size: int = 112, teacher_patch_size: int = 14) -> ImagePlanner:
    """What pictures become, by default for the model `eve_mini`."""
    sizes = {"image_size": image_size, "teacher_size": teacher_size, "teacher_patch_size": teacher_patch_size}
    return find_family("eve").image_planner(sizes)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A small smooth picture without symmetry, so that a turn or a flip shows."""
    y, x = np.mgrid[0:height, 0:width]
    red = 255 * x // max(width - 1, 1)
    green = 255 * y // max(height - 1, 1)
    blue = (red + 2 * green + 40 * seed) // 3 % 256
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """The bytes of a file."""
    stream = BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def caption_row(number: int, image: object, caption: str = "A red car.") -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": caption}]
    return {"id": f"id{number}", "image": image, "conversations": turns}


def run(config: PreprocessConfig) -> DatasetInfo:
    return preprocess(config, progress=False)


def text_row(question: str = "Why?", answer: str = "Because.") -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def turns(*texts: object) -> list[dict[str, object]]:
    """Turns of a conversation, a question first."""
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def opened(config: PreprocessConfig) -> IndexedVisionDataset:
    return IndexedVisionDataset(config.output_prefix)


def skipped_rows(config: PreprocessConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{config.output_prefix}_skipped.jsonl").open()]


def write_dataset(prefix: Path, rows: int, seed: int, **settings: Any) -> str:
    """Noise pictures of all shapes with random captions; a fifth of the rows have none, some have two."""
    noise = np.random.default_rng(seed)
    with DatasetWriter(prefix, replace(MINI_SETTINGS, **settings)) as writer:
        for row in range(rows):
            images = []
            for _ in range((1, 1, 2, 0, 1)[row % 5]):
                width, height = noise.integers(60, 400, 2).tolist()
                stream = BytesIO()
                pixels = noise.integers(0, 255, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(stream, "JPEG")
                images.append(StoredImage(stream.getvalue(), width, height))
            caption = noise.integers(3, 384, noise.integers(5, 40)).tolist()
            head = [1, *[-200] * len(images)]
            writer.add_sample([*head, *caption], [*[-100] * len(head), *caption], images)
        writer.finalise()
    return str(prefix)
