"""Adapters beside peft's: the same logits and the same training, and folders that go both ways."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_eve.config import LoRAConfig, OptimizerConfig
from megatron_eve.inference.generate import generation_config
from tests.convert.test_conversion import convert, llama
from tests.families.suite import run, saving_in
from tests.layouts import TP2_PP2
from tests.lora.runs import STEPS, logits_of, lora_config, starting_from, steps_of
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

IDS = [1, 40, 41, 200, 77, 5, 300, 9]
# Of the front end, which begins at random.
SIZES = ("--image-size", 224, "--patch-embedding-size", 32)
RATE = 1e-3


@pytest.fixture(scope="module")
def peft() -> Any:
    """Imported late: it takes seconds, and ranks that import this file need none of it."""
    return pytest.importorskip("peft")


def language_model(folder: Path) -> Path:
    """The decoder of `lora_config`, as transformers writes it."""
    return llama(folder, num_key_value_heads=2)


def hf_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.tensor([ids])).logits[0]
    return found


@pytest.fixture(scope="module")
def trained(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A language model, and a run of two steps under TP 2 x PP 2 that trains adapters on it."""
    folder = tmp_path_factory.mktemp("trained")
    base = language_model(folder / "base")
    config = starting_from(lora_config(TP2_PP2.parallel, 2), base)
    ranks.run(4, run, saving_in(config, folder / "run"), 2, True)
    return base, folder / "run"


def test_peft_gives_our_logits(
    ranks: RankPool, tmp_path: Path, trained: tuple[Path, Path], peft: Any
) -> None:
    """An exported adapter on the language model, and what merge_and_unload makes of both."""
    from transformers import AutoModelForCausalLM

    base, saved = trained
    (ours,) = ranks.run(1, logits_of, generation_config(lora_config(), 1, 1), str(saved), IDS)
    assert convert("export", "--source", saved, "--target", tmp_path / "adapter", "--format", "adapter") == 0
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = hf_logits(plain, IDS)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    theirs = hf_logits(adapted, IDS)
    assert (before - theirs).abs().max() > 1e-3
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    merged = adapted.merge_and_unload().state_dict()
    assert convert("export", "--source", saved, "--target", tmp_path / "merged") == 0
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name in (name for name in merged if "layers." in name or name.startswith("lm_head")):
        assert (found[name] - merged[name]).abs().max() < 1e-6, name
    assert not any("lora" in name for name in found)


def test_it_trains_as_peft_does(
    ranks: RankPool, tmp_path: Path, trained: tuple[Path, Path], peft: Any
) -> None:
    """Steps of AdamW from the same adapters on the same text: the same adapters."""
    from transformers import AutoModelForCausalLM

    base, saved = trained
    config = replace(lora_config(), optimizer=OptimizerConfig(lr=RATE, lr_warmup_fraction=0.0))
    (ours,) = ranks.run(1, steps_of, config, str(saved), IDS)
    assert convert("export", "--source", saved, "--target", tmp_path / "adapter", "--format", "adapter") == 0
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True)
    adapters = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    before = {name: parameter.detach().clone() for name, parameter in adapters.items()}
    optimizer = torch.optim.AdamW(adapters.values(), lr=RATE, weight_decay=0.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = model(torch.tensor([IDS[:-1]])).logits[0]
        torch.nn.functional.cross_entropy(logits, torch.tensor(IDS[1:])).backward()
        optimizer.step()
    assert set(ours) == set(adapters)
    for name, parameter in adapters.items():
        moved = (parameter - before[name]).norm()
        assert moved > 0 and (ours[name] - parameter).norm() < 1e-3 * moved, name


def test_an_adapter_of_peft_trains_on(
    ranks: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str], peft: Any
) -> None:
    """peft's folder with its model: imported, the same logits; exported again, the same tensors."""
    from transformers import AutoModelForCausalLM

    base = language_model(tmp_path / "base")
    settings = peft.LoraConfig(
        r=5, lora_alpha=7, target_modules=["q_proj", "k_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    words = ("--source", base, "--adapter", tmp_path / "adapter", *SIZES)
    assert convert("import", *words, "--target", tmp_path / "start") == 0
    lora = LoRAConfig(
        lora_rank=5, lora_alpha=7.0, lora_dropout=0.0, lora_target=("q_proj", "k_proj", "down_proj")
    )
    config = lora_config(lora=lora)
    (ours,) = ranks.run(1, logits_of, generation_config(config, 1, 1), str(tmp_path / "start"), IDS)
    assert (ours - hf_logits(model, IDS)).norm() / ours.norm() < 1e-5
    assert (
        convert(
            "export", "--source", tmp_path / "start", "--target", tmp_path / "back", "--format", "adapter"
        )
        == 0
    )
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "back"))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len(before) == 4 * 3 * 2
    settings_back = peft.LoraConfig.from_pretrained(tmp_path / "back")
    assert (settings_back.r, settings_back.lora_alpha) == (5, 7)
    assert set(settings_back.target_modules) == set(settings.target_modules)
    trace = ranks.run(
        4, run, starting_from(replace(config, parallel=TP2_PP2.parallel), tmp_path / "start"), 2
    )
    assert len(trace[-1].losses) == 2
    capsys.readouterr()
