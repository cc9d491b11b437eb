"""Datasets of the family vila_u with pictures to draw, and their codes, for tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_eve.config import RunConfig
from megatron_eve.config.recipe import parse
from megatron_eve.data.format.code_part import dataset_digest
from megatron_eve.data.format.joined import open_dataset
from tests.data.helpers import MakeConfig, picture, run
from tests.data.tokenizing.helpers import write_codes

# Behind the 384 pieces of the tests' tokenizer.
IM_START, IM_END, VI_START, VI_END = range(384, 388)
ROWS = 16  # of a picture: a grid of 4 x 4


def row(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        **fields,
    }


READ = row("<image>\nWhat is it?", "A car.", image="ok.jpg", id="read")
DRAW = row("A red car.", "<image>", image="ok.jpg", id="draw", draw=True)
BOTH = row(
    "Like <image> but green.", "Here: <image>", images=["ok.jpg", "wide.png"], id="both", draw=[False, True]
)
TEXT = row("Why?", "Because.", id="text")


def vila_u(**settings: Any) -> dict[str, Any]:
    """Settings of preprocessing for a grid of 4 x 4."""
    return {"family": "vila_u", "template": "v1", "image_settings": {"code_grid": 4}} | settings


def make_dataset(
    make_config: MakeConfig, rows: list[dict[str, Any]], name: str = "set", **settings: Any
) -> str:
    """A dataset of conversations; the prefix."""
    config = make_config(rows, **vila_u(**settings))
    picture(60, 20).save(Path(str(config.image_root)) / "wide.png")
    config = replace(config, output_prefix=str(Path(config.output_prefix).parent / name))
    run(config)
    return config.output_prefix


def add_codes(prefix: str, **changes: Any) -> None:
    """Codes of a dataset with images: of 4 x 4 positions, 4 codes each, below 1024; 7 more at each image."""
    dataset = open_dataset(prefix)
    sizes = {"grid": (4, 4), "depth": 4, "codebook_size": 1024} | changes
    digest = dataset_digest(dataset)
    write_codes(Path(prefix), dataset_sha256=digest, num_images=dataset.info.num_images, **sizes)


def run_config(*prefixes: str, **flags: str) -> RunConfig:
    """A run on datasets."""
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    return parse(
        [
            "--preset",
            "vila_u_tiny",
            "--vocab-size",
            "388",
            "--seq-length",
            "512",
            "--data-path",
            *prefixes,
            *words,
        ]
    )
