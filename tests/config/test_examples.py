"""The recipes of the published size: what the published runs fixed is in them; every layout is valid and has room."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eve.config import RunConfig, load_recipe, validate

EXAMPLES = Path(__file__).parents[2] / "examples"
LAYOUTS = EXAMPLES / "eve_7b" / "layouts"
# Stage, batch, rate and warm-up of Table 8 of the paper; samples of the recipe.
RECIPES = {
    "eve_7b/stage1": (1, 512, 4e-4, 0.03, 16_000_000),
    "eve_7b/stage2": (2, 512, 4e-5, 0.01, 33_000_000),
    "eve_7b/stage3": (3, 128, 2e-5, 0.01, 665_000),
    "eve_7b/stage3_hd": (3, 128, 2e-5, 0.01, 1_800_000),
    "eve_0.5m/stage1": (1, 512, 4e-4, 0.03, 558_000),
    "eve_0.5m/stage2": (2, 512, 4e-5, 0.01, 558_000),
    "eve_0.5m/stage3": (3, 128, 2e-5, 0.01, 665_000),
}
AT_672 = [name for name in RECIPES if not name.endswith("_hd")]
# Recipes, the layout over them, ranks, and GB of a card.
CHOICES = [
    *((name, None, ranks, 40) for name in RECIPES for ranks in (8, 16, 32)),
    *((name, "a100", ranks, 40) for name in AT_672 for ranks in (16, 32)),
    *((name, "h100", ranks, 80) for name in AT_672 for ranks in (8, 16, 32)),
    *(("eve_7b/stage3_hd", "h100_hd", ranks, 80) for ranks in (8, 16, 32)),
]


def _load(name: str, layout: str | None = None) -> RunConfig:
    paths = [EXAMPLES / f"{name}.yaml"]
    return load_recipe(*paths, *([LAYOUTS / f"{layout}.yaml"] if layout else []))


def _gigabytes(config: RunConfig, ranks: int) -> float:
    """The arithmetic of docs/operations.md (Layouts), where everything trains."""
    model, parallel = config.model, config.parallel
    split = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    held = 6.81e9 / split * (2 + 4 + 12 / (ranks / split))
    kept = 34 * model.hidden_size * config.data.seq_length / parallel.tensor_model_parallel_size
    layers = 1 if config.training.recompute_granularity == "full" else model.num_layers
    return (held + kept * layers) / 1e9


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_published_runs_fixed(name: str) -> None:
    config = _load(name)
    stage, batch, rate, warmup, samples = RECIPES[name]
    assert (config.training.stage, config.training.global_batch_size) == (stage, batch)
    assert (config.optimizer.lr, config.optimizer.lr_warmup_fraction) == (rate, warmup)
    assert (config.optimizer.clip_grad, config.optimizer.weight_decay) == (0.0, 0.0)
    assert config.training.train_samples == samples
    assert config.data.group_by_modality == (stage == 3)
    assert config.vision.image_size == (1344 if "hd" in name else 672)
    assert config.vision.patch_aligning


@pytest.mark.parametrize(("name", "layout", "ranks", "card"), CHOICES)
def test_recipes_and_layouts(name: str, layout: str | None, ranks: int, card: int) -> None:
    """Each is valid for its ranks, changes nothing but the layout, and leaves a quarter of a card free."""
    config = _load(name, layout)
    plain = _load(name)
    assert (config.optimizer, config.data, config.model, config.vision) == (
        plain.optimizer, plain.data, plain.model, plain.vision,
    )  # fmt: skip
    ready = replace(
        config,
        vision=replace(config.vision, patch_aligning=False),
        data=replace(config.data, mock_data=True),
        checkpoint=replace(config.checkpoint, save="run"),
    )
    validate(ready, ranks)
    assert _gigabytes(config, ranks) < 0.75 * card


def test_every_layout_is_tested() -> None:
    assert {path.stem for path in LAYOUTS.glob("*.yaml")} == {layout for _, layout, _, _ in CHOICES if layout}


# Stage, batch, rate and samples of VILA's recipes; the published ones but for the samples of stages 2 and 3.
VILA = {
    "vila_7b/stage1": (1, 256, 1e-3, 595_000),
    "vila_7b/stage2": (2, 1024, 5e-5, 31_000_000),
    "vila_7b/stage3": (3, 128, 2e-5, 2_700_000),
    "vila15_8b/stage1": (1, 256, 1e-3, 595_000),
    "vila15_8b/stage2": (2, 1024, 5e-5, 31_000_000),
    "vila15_8b/stage3": (3, 128, 1e-4, 2_700_000),
}


@pytest.mark.parametrize("name", VILA)
def test_recipes_of_vila(name: str) -> None:
    config = _load(name)
    training, optimizer, vision = config.training, config.optimizer, config.vision
    assert (training.stage, training.global_batch_size, optimizer.lr, training.train_samples) == VILA[name]
    assert (optimizer.lr_warmup_fraction, optimizer.clip_grad, optimizer.weight_decay) == (0.03, 0.0, 0.0)
    assert config.family == "vila"
    # VILA-1.5 trains its tower in stage 3, and never crops.
    assert vision.freeze_ViT == (name != "vila15_8b/stage3")
    assert vision.image_fit == {"vila_7b/stage1": "crop"}.get(name, "stretch" if "15" in name else "pad")
    ready = replace(
        config, data=replace(config.data, mock_data=True), checkpoint=replace(config.checkpoint, save="run")
    )
    validate(ready, 32)


# Stage, batch, rate and samples of VILA-U's recipes; the published ones but for the samples.
VILA_U = {
    "vila_u_7b/pretrain": (2, 4096, 5e-5, 23_000_000),
    "vila_u_7b/sft": (3, 4096, 1e-4, 4_000_000),
}


@pytest.mark.parametrize("name", VILA_U)
def test_recipes_of_vila_u(name: str) -> None:
    config = _load(name)
    training, optimizer = config.training, config.optimizer
    assert (training.stage, training.global_batch_size, optimizer.lr, training.train_samples) == VILA_U[name]
    assert (optimizer.lr_warmup_fraction, optimizer.clip_grad, optimizer.weight_decay) == (0.03, 0.0, 0.0)
    assert config.family == "vila_u" and config.vision.depth_dropout == 0.1
    assert (config.data.seq_length, config.model.rotary_seq_len_interpolation_factor) == (8192, 2.0)
    ready = replace(
        config, data=replace(config.data, mock_data=True), checkpoint=replace(config.checkpoint, save="run")
    )
    validate(ready, 32)


# Stage, batch, rate, samples and sides of pictures of EVE v2's recipes, as the released scripts have them.
EVE2 = {
    "eve2_7b/stage0": (0, 1024, 2e-4, 10_000_000, 800),
    "eve2_7b/stage1_0": (1, 1024, 1e-4, 29_000_000, 800),
    "eve2_7b/stage1_1": (1, 1024, 5e-5, 48_000_000, 1600),
    "eve2_7b/stage2": (2, 512, 2e-5, 15_000_000, 1600),
    "eve2_7b/stage3": (3, 512, 1e-5, 7_300_000, 1600),
}


@pytest.mark.parametrize("name", EVE2)
def test_recipes_of_eve2(name: str) -> None:
    config = _load(name)
    training, optimizer = config.training, config.optimizer
    found = (training.stage, training.global_batch_size, optimizer.lr, training.train_samples)
    assert (*found, config.vision.max_image_side) == EVE2[name]
    assert (optimizer.lr_warmup_fraction, optimizer.clip_grad, optimizer.weight_decay) == (0.03, 0.0, 0.0)
    assert config.family == "eve2" and config.model.modality_experts == (name != "eve2_7b/stage0")
    ready = replace(
        config, data=replace(config.data, mock_data=True), checkpoint=replace(config.checkpoint, save="run")
    )
    validate(ready, 32)
    assert _gigabytes(config, 32) < 0.75 * 80
