"""Adapters of EVE: peft puts an exported folder, with the front end that trained beside it, on an exported model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import megatron_eve.hf  # noqa: F401 - registers the model
from megatron_eve.config import CheckpointConfig, LoRAConfig
from megatron_eve.inference.generate import generation_config
from tests.convert.test_conversion import TEACHER, convert
from tests.families.eve import run_config
from tests.families.suite import run, saving_in
from tests.families.test_shared import answers
from tests.golden_dir import find_golden
from tests.layouts import ONE, PP2
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed


def answered(folder: Path, picture: Image.Image, adapter: Path | None = None) -> torch.Tensor:
    """Logits of an exported model for a picture and a question, with an adapter or without."""
    from transformers import AutoModelForCausalLM, AutoProcessor

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = pytest.importorskip("peft").PeftModel.from_pretrained(model, adapter)
    inputs = AutoProcessor.from_pretrained(folder)(
        text="<image>\nUSER: What is shown? ASSISTANT:", images=[picture], return_tensors="pt"
    )
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**inputs).logits
    return logits


@pytest.mark.slow
def test_an_adapter_brings_its_front_end(ranks: RankPool, tmp_path: Path, exported: Path) -> None:
    """On the model that the run began from: the logits of the merged export, which answers as the checkpoint does."""
    saved, adapter, merged, imported = (tmp_path / name for name in ("run", "adapter", "merged", "imported"))
    config = replace(run_config(PP2.parallel, 3), lora=LoRAConfig(lora_rank=4))
    config = replace(config, optimizer=replace(config.optimizer, lr=1e-2))
    ranks.run(2, run, saving_in(config, saved), 3, True)
    assert convert("export", "--source", saved, "--target", adapter, "--format", "adapter") == 0
    words = ("--format", "transformers", "--tokenizer", find_golden("tokenize"))
    assert convert("export", "--source", saved, "--target", merged, *words) == 0
    picture = Image.effect_noise((90, 60), 80).convert("RGB")
    plain, whole, both = (
        answered(exported, picture), answered(merged, picture), answered(exported, picture, adapter),
    )  # fmt: skip
    assert (plain - whole).norm() > 0.01 * whole.norm()
    assert (both - whole).norm() < 1e-5 * whole.norm()
    alone = generation_config(replace(config, parallel=ONE.parallel), 1, 1)
    (ours,) = ranks.run(1, answers, alone, str(saved), True)
    (theirs,) = ranks.run(1, answers, replace(alone, lora=LoRAConfig()), str(merged), True)
    assert ours == theirs
    # Put on the language model again, the same checkpoint comes out but for the aligning layer.
    words = (
        "--source",
        find_golden("_shared/hf_mini224"),
        "--adapter",
        adapter,
        "--teacher-model",
        find_golden(TEACHER),
    )
    assert convert("import", "--target", imported, *words) == 0
    again = replace(config, checkpoint=CheckpointConfig(pretrained_checkpoint=str(imported)))
    (back,) = ranks.run(1, answers, alone, str(imported), True)
    assert back == ours and len(ranks.run(2, run, again, 1)[-1].losses) == 1
