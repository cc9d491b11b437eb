"""The name rules of a model (the decoder's and its family's), applied to its tensors and to a folder's keys."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from megatron_eve.models.decoder.names import IGNORED_KEYS, decoder_rules
from megatron_eve.models.family import ModelFamily, ModelSettings
from megatron_eve.models.hf_folder import HFFolder
from megatron_eve.models.name_rules import Rule, rule_for
from megatron_eve.models.registry import find_family
from megatron_eve.models.tensor_layouts import Sizes, Vocabulary


def rules_of(settings: ModelSettings) -> tuple[Rule, ...]:
    """All rules of a model."""
    family = find_family(settings.family).hugging_face().rules(settings.model, settings.vision)
    return (*decoder_rules(settings.model), *family)


def to_hf(
    megatron_name: str, shards: Sequence[torch.Tensor], sizes: Sizes, settings: ModelSettings
) -> dict[str, torch.Tensor]:
    """One of our tensors (or its gradient), given its shards in tensor-parallel order, as Hugging Face tensors."""
    rule, names = rule_for(megatron_name, rules_of(settings))
    full = rule.layout.unshard(shards)
    if isinstance(rule.layout, Vocabulary):
        full = full[: settings.model.vocab_size]
    return dict(zip(names, rule.layout.split(full, sizes, len(names)), strict=True))


def open_weights(folder: Path, folders: Mapping[str, Mapping[str, str]], settings: ModelSettings) -> HFFolder:
    """The tensors of a folder, and of the folders that hold parts which it lacks (`HFFormat.part_folders`).

    Args:
        folder: of a model of the family, or of a language model alone.
        folders: in which its weights lie (`HFConfig.folders`).
        settings: of the model that is to be filled.

    Raises:
        ConfigError: see `HFFolder`.
    """
    source, its = HFFolder(folder, folders), find_family(settings.family).hugging_face()
    keys = list(source.keys())
    for part in its.part_folders(settings.vision):
        if not any(its.optional_parts[part.part].fullmatch(key) for key in keys):
            source.add(part)
    return source


def lacking_parts(family: ModelFamily, keys: Collection[str], language_model: bool) -> tuple[str, ...]:
    """Parts of the model (names of `ModelFamily.parts`) that are missing in a folder.

    Args:
        family: of the model.
        keys: of the folder.
        language_model: the folder holds a language model alone.
    """
    optional = family.hugging_face().optional_parts
    return tuple(
        part
        for part in family.parts
        if (language_model and part not in optional)
        or (part in optional and not any(optional[part].fullmatch(key) for key in keys))
    )


def optional_part(family: ModelFamily, key: str) -> str | None:
    """The optional part to which a key of a folder belongs; None if it belongs to none."""
    found = family.hugging_face().optional_parts.items()
    return next((part for part, keys in found if keys.fullmatch(key)), None)


def ignored_because(family: ModelFamily, key: str) -> str | None:
    """The reason why a key of a folder is ignored; None if it must not be ignored."""
    for pattern, reason in (IGNORED_KEYS | dict(family.hugging_face().ignored_keys)).items():
        if re.fullmatch(pattern, key):
            return reason
    return None


def unknown_keys(settings: ModelSettings, keys: Collection[str]) -> list[str]:
    """Keys of a folder that no rule of a model of this depth knows, and that are not ignored, in the folder's order."""
    family = find_family(settings.family)
    known: set[str] = set()
    patterns = []
    for rule in rules_of(settings):
        for name in rule.hf:
            if rule.megatron.startswith("decoder.layers.*"):
                known.update(name.replace("*", str(i)) for i in range(settings.model.num_layers))
            elif "*" in name:
                patterns.append(re.compile(re.escape(name).replace(r"\*", ".+")))
            else:
                known.add(name)
    return [
        key
        for key in keys
        if key not in known
        and not any(pattern.fullmatch(key) for pattern in patterns)
        and optional_part(family, key) is None
        and ignored_because(family, key) is None
    ]
