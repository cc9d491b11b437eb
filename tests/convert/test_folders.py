"""A model of which each part has a folder of its own, with a config.json and weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert.test_conversion import convert
from tests.convert.test_language_models import folder_of

FAMILY = "tests.convert.toy_in_folders"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model in the layout of the public VILA-1.5 folders, with a Qwen2 in bfloat16."""
    whole = tmp_path / "model"
    whole.mkdir()
    folder_of(tmp_path, "qwen2", "bfloat16").rename(whole / "llm")
    (whole / "config.json").write_text(json.dumps({"model_type": "toy_in_folders", "llm_cfg": {}}))
    for name, shape in (("vision_tower", (64, 3)), ("mm_projector", (3, 64))):
        (whole / name).mkdir()
        (whole / name / "config.json").write_text("{}")
        tensors = {"weight": torch.randn(shape), "bias": torch.randn(shape[0])}
        save_file(tensors, whole / name / "model.safetensors")
    return whole


def test_a_model_in_folders_becomes_a_checkpoint(source: Path, tmp_path: Path) -> None:
    start, back = tmp_path / "start", tmp_path / "back"
    assert convert("import", "--family", FAMILY, "--source", source, "--target", start) == 0
    assert convert("export", "--family", FAMILY, "--source", start, "--target", back) == 0
    found = load_file(back / "model.safetensors")
    wanted = load_file(source / "llm" / "model.safetensors")
    for folder, prefix in (("vision_tower", "model.front_end."), ("mm_projector", "model.colour_head.")):
        tensors = load_file(source / folder / "model.safetensors")
        wanted |= {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "mistral"},
            "llm/config.json: model_type is 'mistral', and Llama and Qwen2 are known here",
        ),
        ({"num_hidden_layers": 0}, "llm/config.json: has no num_hidden_layers above 0"),
        ({"rope_parameters": None, "rope_theta": 0.5}, "llm/config.json: rope_theta is 0.5"),
        (None, "llm/config.json: No such file or directory"),
    ],
)
def test_what_is_wrong_is_said_of_the_folder(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object] | None,
    message: str,
) -> None:
    path = source / "llm" / "config.json"
    fields = json.loads(path.read_text())
    path.unlink()
    if change is not None:
        path.write_text(json.dumps({**fields, **change}))
    assert convert("import", "--family", FAMILY, "--source", source, "--target", tmp_path / "start") == 2
    assert f"{source}/{message}" in capsys.readouterr().err
