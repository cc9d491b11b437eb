"""EVE v2's folders to a checkpoint and back, and a language model whose weights become experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.convert.test_conversion import convert
from tests.golden_dir import find_golden


@pytest.mark.parametrize("name", ["hf_all", "hf_stage0"])
def test_published_folders_come_back(tmp_path: Path, name: str) -> None:
    source = find_golden("eve_v2") / "_shared" / name
    assert convert("import", "--source", source, "--target", tmp_path / "run") == 0
    assert convert("export", "--source", tmp_path / "run", "--target", tmp_path / "back") == 0
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert theirs.keys() == ours.keys()
    assert all(theirs[key].equal(ours[key]) for key in theirs)
    written, published = (
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for folder in (tmp_path / "back", source)
    )
    for field in ("model_type", "architectures", "add_moe", "moe_part", "mm_hidden_size", "hidden_size"):
        assert written[field] == published.get(field), field


@pytest.mark.parametrize("source", ["hf_qwen2", "hf_stage0"])
def test_experts_begin_as_copies(tmp_path: Path, source: str) -> None:
    """The copy of the published script: each tensor of an expert is its twin's, and nothing else changes."""
    folder = find_golden("eve_v2") / "_shared" / source
    flags = ("--family", "eve2", "--patch-embedding-size", 24) if source == "hf_qwen2" else ()
    target = tmp_path / "run"
    assert convert("import", "--source", folder, "--target", target, "--modality-experts", *flags) == 0
    assert convert("export", "--source", target, "--target", tmp_path / "back") == 0
    ours = load_file(tmp_path / "back" / "model.safetensors")
    theirs = load_file(find_golden("eve_v2") / "_shared" / "hf_init_copy" / "model.safetensors")
    language = {key for key in theirs if "vision_tower" not in key}
    assert all(theirs[key].equal(ours[key]) for key in language)
    assert theirs.keys() == ours.keys()
