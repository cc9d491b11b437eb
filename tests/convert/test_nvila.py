"""NVILA's folders: one tile a picture, tiles by its size, and what of it is not built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.checkpoint.state import saved_config
from tests.convert.test_conversion import convert
from tests.convert.vila_folders import edit_config, same, tensors
from tests.golden_dir import find_golden


@pytest.fixture
def nvila(tmp_path: Path) -> Path:
    """A folder that the public code wrote."""
    return Path(shutil.copytree(find_golden("golden/vila/vila_main_embed") / "model", tmp_path / "nvila"))


@pytest.mark.parametrize(
    ("fields", "fit", "max_tiles"),
    [
        ({}, "stretch", 12),
        ({"image_aspect_ratio": "dynamic"}, "tiles", 12),
        ({"image_aspect_ratio": "dynamic", "max_tiles": 6}, "tiles", 6),
        ({"image_aspect_ratio": "dynamic", "max_tiles": None, "min_tiles": None}, "tiles", 12),
    ],
)
def test_there_and_back(
    nvila: Path, tmp_path: Path, fields: dict[str, Any], fit: str, max_tiles: int
) -> None:
    """All weights, and how a picture becomes squares."""
    edit_config(nvila, **fields)
    assert convert("import", "--source", nvila, "--target", tmp_path / "run") == 0
    vision = saved_config(str(tmp_path / "run"))["vision"]
    assert (vision["image_fit"], vision["max_tiles"]) == (fit, max_tiles)
    assert vision["projector_token_order"] == "row"
    assert convert("export", "--source", tmp_path / "run", "--target", tmp_path / "back") == 0
    assert same(tensors(nvila), tensors(tmp_path / "back"))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["image_aspect_ratio"] == ("dynamic" if fit == "tiles" else "resize")
    assert fit != "tiles" or (config["min_tiles"], config["max_tiles"]) == (1, max_tiles)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"image_aspect_ratio": "dynamic_s2", "dynamic_s2": True, "s2_scales": "448,896,1344"},
            "dynamic_s2 is True, and features of a picture at several scales (S2) are not computed here",
        ),
        (
            {"image_aspect_ratio": "dynamic_s2"},
            "image_aspect_ratio is 'dynamic_s2', and features of a picture at several scales (S2)",
        ),
        ({"ps3": True}, "ps3 is True, and pictures of 4K by a PS3 tower are not computed here; take a model"),
    ],
)
def test_what_is_not_built(
    nvila: Path, tmp_path: Path, fields: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(nvila, **fields)
    assert convert("import", "--source", nvila, "--target", tmp_path / "run") == 2
    first, *others = capsys.readouterr().err.strip().splitlines()
    assert first.startswith(f"error: {nvila}/config.json: {message}") and not others


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--format", "transformers", "--tokenizer", "TOKENIZER"),
            "its processor cuts no pictures into tiles",
        ),
        (
            ("--published-layout", "vila1.0", "--tokenizer", "TOKENIZER"),
            "pictures in tiles are in no VILA 1.0; add --published-layout vila1.5",
        ),
    ],
    ids=["transformers", "vila1.0"],
)
def test_tiles_are_in_no_other_layout(
    nvila: Path, tmp_path: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(nvila, image_aspect_ratio="dynamic")
    assert convert("import", "--source", nvila, "--target", tmp_path / "run") == 0
    capsys.readouterr()
    tokenizer = str(nvila / "llm" / "tokenizer.json")
    given = [tokenizer if word == "TOKENIZER" else word for word in words]
    assert convert("export", "--source", tmp_path / "run", "--target", tmp_path / "out", *given) == 2
    first, *others = capsys.readouterr().err.strip().splitlines()
    assert message in first and not others and not (tmp_path / "out").exists()
