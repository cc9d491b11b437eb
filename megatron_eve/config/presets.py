"""Model sizes by name, of every family there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_eve.config import schema
from megatron_eve.models.family import Preset
from megatron_eve.models.registry import (
    DEFAULT_FAMILY,
    families,
    family_names,
    find_family,
    tower_families,
    tower_family_names,
)


def _default_settings(family: str) -> Any:
    return find_family(family).Config()


schema.family_defaults = schema.FamilyDefaults(DEFAULT_FAMILY, _default_settings)


class _Presets(Mapping[str, Preset]):
    """Presets of all families, looked up on access: families import this package, so not at import time."""

    def __getitem__(self, name: str) -> Preset:
        for family in (*families(), *tower_families()):
            if name in family.presets:
                return family.presets[name]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for family in (*families(), *tower_families()) for name in family.presets)

    def __len__(self) -> int:
        return sum(len(family.presets) for family in (*families(), *tower_families()))


def family_of_preset(preset: str) -> str:
    """The name of a preset's model family.

    Raises:
        KeyError: no family has such a preset.
    """
    for name in (*family_names(), *tower_family_names()):
        if preset in find_family(name).presets:
            return name
    raise KeyError(preset)


def presets_of(trains: str) -> tuple[str, ...]:
    """Names of the presets of the families whose runs train a decoder, or a tower."""
    some = families() if trains == "decoder" else tower_families()
    return tuple(name for family in some for name in family.presets)


PRESETS: Mapping[str, Preset] = _Presets()
