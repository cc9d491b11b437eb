"""Adapter folders that an import refuses, each in one sentence that names the folder and the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_eve.config.lora_checks import projection_sizes
from tests.convert.test_conversion import convert, llama
from tests.lora.runs import MODEL

Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model.model.layers"


def tensors(layers: int = 4, rank: int = 3) -> Tensors:
    """Of adapters on two matrices of each layer of `MODEL`."""
    found = {}
    for layer in range(layers):
        for block, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
            inputs, outputs = projection_sizes(MODEL)[name]
            found[f"{PREFIX}.{layer}.{block}.{name}.lora_A.weight"] = torch.ones(rank, inputs)
            found[f"{PREFIX}.{layer}.{block}.{name}.lora_B.weight"] = torch.ones(outputs, rank)
    return found


def write(folder: Path, content: Tensors, **fields: Any) -> Path:
    folder.mkdir()
    usual = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": "hub/llama-other"}
    (folder / "adapter_config.json").write_text(json.dumps({**usual, **fields}))
    save_file(content, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("model") / "llama", num_key_value_heads=2)


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda some: {
        name: value for name, value in some.items() if not any(part in name for part in parts)
    }


def more(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda some: {**some, name: torch.ones(*shape)}


SAME: Callable[[Tensors], Tensors] = dict
WRONG: list[tuple[str, Callable[[Tensors], Tensors], dict[str, Any], str]] = [
    ("wider", more(f"{PREFIX}.0.self_attn.q_proj.lora_A.weight", 3, 128), {},
     "q_proj.lora_A.weight has the shape (3, 128), and this model needs (3, 64), so it is an adapter for another model "
     "(trained on hub/llama-other); name the model that it was trained on as --source"),
    ("deeper", lambda some: tensors(6), {}, "and the model has 4 layers with q_proj"),
    ("other rank", SAME, {"r": 8}, "has the shape (3, 160), and this model needs (8, 160)"),
    ("of a head", more("base_model.model.lm_head.lora_A.weight", 3, 64), {}, "lm_head.lora_A.weight, which is no"),
    ("some layers", without("layers.2."), {}, "adapters of some layers alone are not known here"),
    ("half of a pair", without("layers.2.self_attn.q_proj.lora_B"), {}, "no model.layers.2.self_attn.q_proj.lora_B"),
    ("none", without("lora"), {}, "holds no adapter of a matrix of the decoder"),
    ("DoRA", SAME, {"use_dora": True}, "use_dora is True, which adapters here do not have; merge the adapter into its"),
    ("rsLoRA", SAME, {"use_rslora": True}, "use_rslora is True"),
    ("biases", SAME, {"bias": "all"}, "bias is 'all', and biases do not train here"),
    ("other kind", SAME, {"peft_type": "IA3"}, "peft_type is 'IA3', and only LORA is known here"),
    ("changed weights", SAME, {"init_lora_weights": "pissa_niter_4"}, "which changes the model's own weights"),
    ("no rank", SAME, {"r": None}, "r is None and lora_alpha 6, which must be above 0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "fields", "says"), [one[1:] for one in WRONG], ids=[one[0] for one in WRONG]
)
def test_it_is_refused(
    model: Path,
    tmp_path: Path,
    change: Callable[[Tensors], Tensors],
    fields: dict[str, Any],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = write(tmp_path / "adapter", change(tensors()), **fields)
    words = ("import", "--source", model, "--adapter", adapter, "--target", tmp_path / "out", "--dry-run")
    assert convert(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(adapter) in line and says in line
    assert not (tmp_path / "out").exists()


def test_a_good_one_is_taken(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write(tmp_path / "adapter", tensors())
    words = ("import", "--source", model, "--adapter", adapter, "--target", tmp_path / "out", "--dry-run")
    assert convert(*words) == 0
    assert (
        "decoder.layers.3.mlp.linear_fc2.lora.b <-> model.layers.3.mlp.down_proj.lora_B.weight"
        in capsys.readouterr().out
    )
