"""The settings that a run prints: those that differ from the defaults; the file with all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eve.config import CheckpointConfig, OptimizerConfig, RunConfig, load_recipe
from megatron_eve.config.describe import SETTINGS, describe_settings, preset_of, write_settings
from megatron_eve.config.recipe import named_sources
from megatron_eve.models.registry import families


def test_what_differs_is_said_with_the_defaults() -> None:
    base = RunConfig()
    config = replace(
        base,
        optimizer=OptimizerConfig(lr=1e-3, lr_overrides={"a.*": 4e-4}),
        checkpoint=CheckpointConfig(save="runs/a", save_interval=50),
    )
    assert describe_settings(base, None).count("\n") == 0
    assert describe_settings(config, None, ("a.yaml", "b.yaml")).splitlines()[1:] == [
        "  optimizer: lr = 0.001 [4.0e-05], lr_overrides = {a.*: 0.0004} [none]",
        "  checkpoint: save = runs/a [none], save_interval = 50 [none]",
    ]
    assert "recipe a.yaml, recipe b.yaml" in describe_settings(config, None, ("a.yaml", "b.yaml"))


def test_sizes_of_a_preset_count_as_defaults() -> None:
    family = next(family for family in families() if len(family.presets) > 1)
    name, preset = list(family.presets.items())[-1]
    config = RunConfig(family=family.name, model=preset.model, vision=preset.vision)
    assert preset_of(config) == name
    text = describe_settings(config, None)
    assert f"preset {name}" in text and "model:" not in text
    deeper = replace(config, model=replace(preset.model, num_layers=preset.model.num_layers + 4))
    assert describe_settings(deeper, name).splitlines()[1:] == [
        f"  model: num_layers = {deeper.model.num_layers} [{preset.model.num_layers}]"
    ]


def test_long_sections_are_broken_between_settings() -> None:
    others = OptimizerConfig(
        lr=0.123456789, min_lr=0.0123456789, lr_decay_style="linear", lr_warmup_fraction=0.5, weight_decay=0.25,
        adam_beta1=0.5, adam_beta2=0.5,
    )  # fmt: skip
    config = replace(RunConfig(), optimizer=others)
    lines = describe_settings(config, None).splitlines()
    assert len(lines) > 2 and all(len(line) <= 121 for line in lines[1:])
    assert " ".join(line.strip() for line in lines[1:]).count("[") == 7


def test_the_file_has_all_settings_and_is_a_recipe(tmp_path: Path) -> None:
    config = replace(RunConfig(), optimizer=OptimizerConfig(lr=1e-3, lr_overrides={"a.*": 4e-4}))
    assert write_settings(replace(config, optimizer=OptimizerConfig()), tmp_path / "run").name == SETTINGS
    path = write_settings(config, tmp_path / "run")
    assert load_recipe(path) == config
    assert [one.name for one in path.parent.iterdir()] == [SETTINGS]


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_settings(RunConfig(), tmp_path)
    before = path.read_text()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_settings(replace(RunConfig(), optimizer=OptimizerConfig(lr=1e-3)), tmp_path)
    assert path.read_text() == before
    assert [one.name for one in tmp_path.iterdir()] == [SETTINGS]


def test_the_preset_and_the_recipes_of_a_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "a.yaml"
    recipe.write_text("preset: eve_mini\n")
    assert named_sources(["--config", str(recipe)]) == ("eve_mini", (str(recipe),))
    assert named_sources(["--config", str(recipe), "--preset", "eve_tiny"])[0] == "eve_tiny"
    assert named_sources(["--lr", "1"]) == (None, ())
