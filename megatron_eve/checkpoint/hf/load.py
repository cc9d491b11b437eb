"""Read a model in the published Hugging Face layout into this rank's model chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_eve.checkpoint.hf.config import HFConfig, check_config
from megatron_eve.checkpoint.hf.folder import HFFolder
from megatron_eve.checkpoint.hf.tables import (
    ALIGNING_HF_KEYS,
    IGNORED_HF_KEYS,
    PUBLISHED_TAP_INTERVAL,
    Layout,
    Sizes,
    eve_rules,
    source_for,
)
from megatron_eve.config import ConfigError
from megatron_eve.models.family import ModelSettings, Preset, begins_at_random, parts_lacking
from megatron_eve.models.registry import find_family
from megatron_eve.runtime.progress_bar import byte_progress
from megatron_eve.runtime.ranks import print_rank_0


def model_config_of(
    folder: Path, image_size: int, teacher_size: int, teacher_hidden_size: int | None = None
) -> Preset:
    """The sizes that a published `config.json` describes; pixel sizes and the teacher's width are not in it."""
    teacher = {} if teacher_hidden_size is None else {"teacher_hidden_size": teacher_hidden_size}
    return HFConfig.read(folder).model_config(image_size=image_size, teacher_size=teacher_size, **teacher)


def load_hf_weights(folder: Path, chunks: Sequence[Any], settings: ModelSettings) -> None:
    """Fill bare model chunks from a folder in the published layout, or of a plain language model, under this run's
    layout.

    An aligning layer that the folder lacks altogether keeps its initial weights; one that the model lacks is not read.
    A plain language model (Vicuna, Llama, Qwen2) fills the decoder, and everything before it keeps its initial weights.

    Raises:
        ConfigError: sizes in config.json that are not this run's, a tensor that is missing or of another shape,
            one that no rule knows, or one of other numbers than floating-point ones. Nothing is changed by then.
    """
    found = check_config(folder, settings)
    source, language_model = HFFolder(folder), not found.is_eve
    planned: list[_Planned] = []
    size = 0
    rules = eve_rules(settings)
    aligned = any(ALIGNING_HF_KEYS.fullmatch(key) for key in source.keys())  # noqa: SIM118
    interval = settings.vision.tap_interval
    wanted = any(chunk.objectives for chunk in chunks)
    if wanted and aligned and interval != PUBLISHED_TAP_INTERVAL:
        raise ConfigError(
            f"{folder}: its aligning layer is tapped every {PUBLISHED_TAP_INTERVAL} layers, this run has "
            f"--tap-interval {interval}; use {PUBLISHED_TAP_INTERVAL}, or train with --no-patch-aligning"
        )
    if wanted and not aligned:
        print_rank_0(f"{folder}: holds no aligning layer, so that of this run keeps its initial weights")
    if language_model:
        print_rank_0(
            f"{folder}: holds a language model alone, so the patch embedding keeps its initial weights"
        )
    # The rules above are those of EVE's folders.
    family, lacking = find_family("eve"), parts_lacking(language_model, aligned)
    for name, parameter, padded in global_parameters(chunks):
        if begins_at_random(family, name, lacking):
            continue
        rule, keys = source_for(name, rules, found.is_tied)
        one = _Planned(parameter, keys, rule.layout, Sizes.of(settings.model, padded))
        parts = [source.describe(key) for key in keys]
        size += sum(shape.numel() * dtype.itemsize for shape, dtype in parts)
        shape = one.shape([shape for shape, _ in parts])
        if shape != parameter.shape:
            raise ConfigError(
                f"{folder}: {', '.join(keys)} makes {name} of shape {tuple(shape)} on this rank, "
                f"but the model has {tuple(parameter.shape)}"
            )
        planned.append(one)
    _check_unexpected(source, settings)
    with byte_progress(f"loading {folder.name}", size) as done, torch.no_grad():
        for one in planned:
            tensors = [source.tensor(key) for key in one.keys]
            one.parameter.copy_(one.shard(tensors))
            done(sum(tensor.nbytes for tensor in tensors))


@dataclass(frozen=True)
class _Planned:
    """A parameter, and the tensors of the folder of which this rank's part is made."""

    parameter: torch.nn.Parameter
    keys: tuple[str, ...]
    layout: Layout
    sizes: Sizes

    def shard(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """This rank's part."""
        return self.layout.shard(
            self.layout.merge(tensors, self.sizes),
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )

    def shape(self, shapes: Sequence[torch.Size]) -> torch.Size:
        """Of this rank's part, where the tensors have these; empty where they do not go together."""
        try:
            return self.shard([torch.empty(shape, device="meta") for shape in shapes]).shape
        except (RuntimeError, IndexError):
            return torch.Size()


def global_parameters(chunks: Sequence[Any]) -> Iterator[tuple[str, torch.nn.Parameter, int]]:
    """Parameters of bare chunks under their global names, each with the padded vocabulary size."""
    for chunk in chunks:
        for name, parameter in chunk.global_named_parameters():
            yield name, parameter, chunk.vocab_size


def _check_unexpected(source: HFFolder, settings: ModelSettings) -> None:
    known = _known_keys(settings)
    for key in source.keys():  # noqa: SIM118
        if (
            key not in known
            and not key.startswith("model.vision_tower.")
            and not IGNORED_HF_KEYS.fullmatch(key)
            and not ALIGNING_HF_KEYS.fullmatch(key)
        ):
            raise ConfigError(
                f"{source.folder}: holds {key}, which no rule knows; is this another model family?"
            )


def _known_keys(settings: ModelSettings) -> set[str]:
    """Hugging Face keys of the decoder and the projector at this depth."""
    keys: set[str] = set()
    for rule in eve_rules(settings):
        for name in rule.hf:
            keys.update(name.replace("*", str(i)) for i in range(settings.model.num_layers))
    return keys
