"""Fixtures of the tests of `data`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.data.preprocessing.preprocess import PreprocessConfig
from megatron_eve.data.text.tokenizer import Tokenizer
from tests.data.helpers import picture
from tests.golden_dir import find_golden

IMAGE_SIZES = ("image_size", "teacher_size", "teacher_patch_size")


@pytest.fixture(scope="session")
def tokenizer_path() -> Path:
    return find_golden("tokenize") / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


@pytest.fixture
def make_config(tmp_path: Path, tokenizer_path: Path) -> Callable[..., PreprocessConfig]:
    """Writes rows to data.json (or lines to data.jsonl); returns a config for images in tmp_path/photos.

    Image sizes are given by their names, beside the fields of the config.
    `tmp_path/photos/ok.jpg` is a picture that is always there.
    """
    photos = tmp_path / "photos"
    photos.mkdir()
    picture(40, 30).save(photos / "ok.jpg")

    def make(rows: Sequence[Any], *, lines: bool = False, **settings: Any) -> PreprocessConfig:
        if lines:
            text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
        else:
            text = json.dumps(rows)
        path = tmp_path / ("data.jsonl" if lines else "data.json")
        path.write_text(text, encoding="utf-8")
        given: dict[str, Any] = {
            "input": str(path),
            "image_root": str(photos),
            "tokenizer_model": str(tokenizer_path),
        }
        sizes = {name: settings.pop(name) for name in IMAGE_SIZES if name in settings}
        given |= {"output_prefix": str(tmp_path / "out" / "set"), "image_settings": sizes}
        return PreprocessConfig(**given | settings)

    return make
