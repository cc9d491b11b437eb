"""Adapters of VILA: peft puts an exported folder, with the projector that trained beside it, on an exported model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import megatron_eve.hf  # noqa: F401 - registers the model
from megatron_eve.config import LoRAConfig
from megatron_eve.models.dist_folder import DistFolder
from megatron_eve.models.vila.config import VILAConfig
from tests.convert.test_conversion import convert
from tests.families.suite import run, saving_in
from tests.golden_dir import find_golden
from tests.layouts import PP2
from tests.lora.runs import lora_config, starting_from
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed


def answered(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    """Logits of an exported model for a picture and a question, with an adapter or without."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = pytest.importorskip("peft").PeftModel.from_pretrained(model, adapter)
    picture = Image.linear_gradient("L").convert("RGB").resize((90, 60))
    inputs = AutoProcessor.from_pretrained(folder)(
        text="<image>\nUSER: What is shown? ASSISTANT:", images=[picture], return_tensors="pt"
    )
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**inputs).logits
    return logits


@pytest.mark.parametrize(
    ("projector", "tower_trains"),
    [
        ("mlp2x_gelu", False),
        pytest.param("mlp2x_gelu", True, marks=pytest.mark.slow),
        pytest.param("mlp_downsample", False, marks=pytest.mark.slow),
        pytest.param("qformer", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_an_adapter_brings_what_trained_beside_it(
    ranks: RankPool, tmp_path: Path, projector: Any, tower_trains: bool
) -> None:
    start, saved, base, adapter, merged = (
        tmp_path / n for n in ("start", "run", "base", "adapter", "merged")
    )
    vision = VILAConfig(freeze_ViT=not tower_trains, projector_type=projector)
    bare = replace(lora_config(family="vila", iterations=1), vision=vision, lora=LoRAConfig())
    ranks.run(1, run, saving_in(bare, start), 1, True)
    config = replace(lora_config(PP2.parallel, 3, LoRAConfig(lora_rank=4), "vila"), vision=vision)
    ranks.run(2, run, saving_in(starting_from(config, start), saved), 3, True)
    words = ("--format", "transformers", "--tokenizer", find_golden("tokenize"))
    assert convert("export", "--source", start, "--target", base, *words) == 0
    assert convert("export", "--source", saved, "--target", merged, *words) == 0
    assert convert("export", "--source", saved, "--target", adapter, "--format", "adapter") == 0
    settings = json.loads((adapter / "adapter_config.json").read_text())
    tower = ["model.vision_tower"] * tower_trains
    assert settings["modules_to_save"] == ["model.multi_modal_projector", *tower]
    # Of the decoder alone: the tower's matrices have the same names.
    adapted = {name for name in load_file(adapter / "adapter_model.safetensors") if "lora_" in name}
    assert len(adapted) == config.model.num_layers * 7 * 2
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in adapted)
    plain, whole, both = answered(base), answered(merged), answered(base, adapter)
    assert (plain - whole).norm() > 0.01 * whole.norm()
    assert (both - whole).norm() < 1e-5 * whole.norm()
    # Put on the exported model, the checkpoint comes back.
    back, again = tmp_path / "back", tmp_path / "again"
    assert convert("import", "--source", base, "--adapter", adapter, "--target", back) == 0
    assert convert("export", "--source", back, "--target", again, *words) == 0
    tensors, expected = (load_file(folder / "model.safetensors") for folder in (again, merged))
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    # So it does from what the published training code writes: the projector in a file of its own, under its own names.
    if projector == "mlp2x_gelu" and not tower_trains:
        pieces = load_file(adapter / "adapter_model.safetensors")
        published = {
            name.replace("multi_modal_projector.linear_1", "mm_projector.0").replace(
                "multi_modal_projector.linear_2", "mm_projector.2"
            ): pieces.pop(name)
            for name in list(pieces)
            if "projector" in name
        }
        assert len(published) == 4
        save_file(pieces, adapter / "adapter_model.safetensors")
        torch.save(published, adapter / "non_lora_trainables.bin")
        third = tmp_path / "third"
        assert convert("import", "--source", base, "--adapter", adapter, "--target", third) == 0
        one, other = (DistFolder(folder / "iter_0000000") for folder in (back, third))
        assert set(one) == set(other)
        assert all(torch.equal(one.tensor(key), other.tensor(key)) for key in one)
