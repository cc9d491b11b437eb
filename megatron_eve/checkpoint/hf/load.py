"""Read a model in Hugging Face layout into this rank's model chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_eve.checkpoint.hf.config import added_rows, check_config
from megatron_eve.checkpoint.hf.rules import lacking_parts, open_weights, rules_of, unknown_keys
from megatron_eve.config import ConfigError
from megatron_eve.models.family import ADAPTERS, ModelSettings, begins_at_random, matches
from megatron_eve.models.hf_folder import HFFolder
from megatron_eve.models.name_rules import source_for
from megatron_eve.models.registry import find_family
from megatron_eve.models.rope_scaling import position_note
from megatron_eve.models.tensor_layouts import Layout, Sizes
from megatron_eve.runtime.progress_bar import byte_progress
from megatron_eve.runtime.ranks import print_rank_0


def load_hf_weights(folder: Path, chunks: Sequence[Any], settings: ModelSettings) -> None:
    """Fill bare model chunks from a folder of the run's family, or of a plain language model, under this run's layout.

    An optional part that is missing there comes from its own folder (`HFFormat.part_folders`), or keeps its initial
    weights; a part that the model lacks is not read. A plain language model (Vicuna, Llama, Qwen2) fills the
    decoder, and all else keeps its initial weights. So do adapters (`--lora-rank`).

    Raises:
        ConfigError: sizes in config.json that are not this run's, a tensor that is missing or of another shape,
            one that no rule knows, or one of other numbers than floating-point ones. The model is unchanged then.
    """
    found = check_config(folder, settings)
    if note := position_note(found.model_config(), settings.model):
        print_rank_0(f"{folder}: {note}")
    if added_rows(found, found.model_config(), find_family(settings.family), settings.model):
        tokens = ", ".join(find_family(settings.family).text_rules.added_tokens)
        print_rank_0(
            f"{folder}: has no rows for {tokens}; those of this run begin as the mean of its other rows"
        )
    family, source = find_family(settings.family), open_weights(folder, found.folders, settings)
    keys = list(source.keys())
    for problem in family.hugging_face().check_weights(settings.vision, source):
        raise ConfigError(f"{folder}: {problem}")
    lacking = lacking_parts(family, keys, language_model=found.family is None)
    if found.family is None:
        rest = [part for part in family.parts if part not in lacking]
        but = f" and the {' and the '.join(rest)}" if rest else ""
        print_rank_0(
            f"{folder}: holds a language model alone, so everything beside the decoder{but} keeps its initial weights"
        )
    else:
        for part in lacking:
            if family.hugging_face().has_part(part, settings.vision):
                print_rank_0(f"{folder}: holds no {part}, so that of this run keeps its initial weights")
    at_random = (*lacking, ADAPTERS)
    filled = [some for some in global_parameters(chunks) if not begins_at_random(family, some[0], at_random)]
    if settings.model.modality_experts and not found.has_experts:
        print_rank_0(f"{folder}: has no experts, so those of this run begin as copies of its weights")
    planned = _plan(folder, source, filled, settings, found.is_tied, found.has_experts)
    for key in unknown_keys(settings, keys):
        raise ConfigError(f"{folder}: holds {key}, which no rule knows; is this another model family?")
    _fill(planned, source, folder.name)


def load_part_folders(chunks: Sequence[Any], settings: ModelSettings) -> None:
    """Fill those parts of bare model chunks that have a folder of their own; all else keeps its initial weights.

    Raises:
        ConfigError: a tensor that is missing, of another shape, or of other numbers than floating-point ones. The model
            is unchanged then.
    """
    family = find_family(settings.family)
    for part in family.hugging_face().part_folders(settings.vision):
        source = HFFolder(part.folder, {})
        source.add(part)
        names = family.parts[part.part]
        filled = [some for some in global_parameters(chunks) if matches(some[0], names)]
        try:
            planned = _plan(part.folder, source, filled, settings, tied=False)
        except ConfigError as error:
            raise ConfigError(f"{part.flag} {error}") from None
        _fill(planned, source, part.folder.name)


def _plan(
    folder: Path,
    source: HFFolder,
    parameters: Iterable[tuple[str, torch.nn.Parameter, int]],
    settings: ModelSettings,
    tied: bool,
    has_experts: bool = True,
) -> list[_Planned]:
    """What each parameter is made from.

    Args:
        folder: for messages.
        source: its tensors.
        parameters: as `global_parameters` gives them.
        settings: of the model.
        tied, has_experts: see `source_for`.

    Raises:
        ConfigError: a tensor that is missing, of another shape, or of other numbers than floating-point ones.
    """
    planned, rules = [], rules_of(settings)
    for name, parameter, padded in parameters:
        rule, names = source_for(name, rules, tied, has_experts)
        parts = [source.describe(key) for key in names]
        size = sum(shape.numel() * dtype.itemsize for shape, dtype in parts)
        one = _Planned(parameter, names, rule.layout, Sizes.of(settings.model, padded), size)
        shape = one.shape([shape for shape, _ in parts])
        if shape != parameter.shape:
            raise ConfigError(
                f"{folder}: {', '.join(names)} makes {name} of shape {tuple(shape)} on this rank, "
                f"but the model has {tuple(parameter.shape)}"
            )
        planned.append(one)
    return planned


def _fill(planned: Sequence[_Planned], source: HFFolder, name: str) -> None:
    """Read the tensors of parameters, with a progress bar that shows the folder's name."""
    with byte_progress(f"loading {name}", sum(one.size for one in planned)) as done, torch.no_grad():
        for one in planned:
            tensors = [source.tensor(key) for key in one.keys]
            one.parameter.copy_(one.shard(tensors))
            done(sum(tensor.nbytes for tensor in tensors))


@dataclass(frozen=True)
class _Planned:
    """A parameter, and the folder's tensors that this rank's part of it is made from; `size` is theirs in bytes."""

    parameter: torch.nn.Parameter
    keys: tuple[str, ...]
    layout: Layout
    sizes: Sizes
    size: int

    def shard(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """This rank's part."""
        return self.layout.shard(
            self.layout.merge(tensors, self.sizes),
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )

    def shape(self, shapes: Sequence[torch.Size]) -> torch.Size:
        """Shape of this rank's part for tensors of these shapes; empty if they do not fit together."""
        try:
            return self.shard([torch.empty(shape, device="meta") for shape in shapes]).shape
        except (RuntimeError, IndexError):
            return torch.Size()


def global_parameters(chunks: Sequence[Any]) -> Iterator[tuple[str, torch.nn.Parameter, int]]:
    """Parameters of bare chunks under their global names, each with the padded vocabulary size."""
    for chunk in chunks:
        for name, parameter in chunk.global_named_parameters():
            yield name, parameter, chunk.vocab_size
