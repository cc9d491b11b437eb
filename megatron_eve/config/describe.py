"""What a run's settings are, for people: those that differ from the defaults; the file with all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from megatron_eve.config.recipe import load_recipe, sections_of
from megatron_eve.config.schema import RunConfig
from megatron_eve.models.registry import find_family

SETTINGS = "settings.yaml"
_WIDTH = 120


def preset_of(config: RunConfig) -> str | None:
    """Name of the preset whose sizes a run has, None if they are its own."""
    family = find_family(config.family)
    sizes = config.model, family.inference_settings(config.vision)
    return next(
        (
            name
            for name, preset in family.presets.items()
            if sizes == (preset.model, family.inference_settings(preset.vision))
        ),
        None,
    )


def describe_settings(config: RunConfig, preset: str | None = None, recipes: Sequence[str] = ()) -> str:
    """The settings that differ from the defaults, by section, with the defaults in brackets.

    Args:
        config: of the run.
        preset: that was named; its sizes count as defaults. None takes the one whose sizes the run has, if any.
        recipes: files of --config, to be named.
    """
    preset = preset or preset_of(config)
    defaults = load_recipe(family=config.family)
    if preset:
        sizes = find_family(config.family).presets[preset]
        defaults = replace(defaults, model=sizes.model, vision=sizes.vision)
    sources = [f"preset {preset}"] * bool(preset) + [f"recipe {recipe}" for recipe in recipes]
    lines = [f"settings that differ from the defaults ({', '.join([f'family {config.family}', *sources])}):"]
    ours, usual = sections_of(config.to_dict()), sections_of(defaults.to_dict())
    for section, values in ours.items():
        changed = [
            f"{name} = {_shown(value)} [{_shown(usual[section][name])}]"
            for name, value in values.items()
            if value != usual[section][name]
        ]
        if changed:
            lines += _wrapped(f"  {section}: ", changed)
    return "\n".join(lines if len(lines) > 1 else [lines[0].removesuffix(":") + ": none"])


def _wrapped(start: str, items: Sequence[str]) -> list[str]:
    """Items behind a heading, in lines of at most `_WIDTH` characters that break between items alone."""
    lines = [start + items[0]]
    for item in items[1:]:
        if len(lines[-1]) + len(item) + 2 > _WIDTH:
            lines[-1] += ","
            lines.append(" " * len(start) + item)
        else:
            lines[-1] += f", {item}"
    return lines


def _shown(value: Any) -> str:
    """A value as a recipe has it, in one line."""
    if isinstance(value, tuple):
        value = list(value)
    if value is None or value in ([], {}):
        return "none"
    return str(yaml.safe_dump(value, default_flow_style=True, width=10**6)).split("\n")[0]


def write_settings(config: RunConfig, folder: str | Path) -> Path:
    """Write all settings to FOLDER/settings.yaml, which --config reads; an older file is replaced.

    Raises:
        OSError: it cannot be written; an older file stays as it is.
    """
    path = Path(folder) / SETTINGS
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{SETTINGS}.{os.getpid()}")
    try:
        unfinished.write_text(
            "# All settings of the latest start of this run. --config reads this file.\n"
            f"{yaml.safe_dump(config.to_dict(), sort_keys=False)}",
            encoding="utf-8",
        )
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
