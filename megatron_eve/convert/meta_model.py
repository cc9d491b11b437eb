"""Names and shapes of a model's tensors, from the model itself, built on torch's meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_eve.checkpoint.state import CONTENT
from megatron_eve.config import ParallelConfig, RunConfig, TrainingConfig
from megatron_eve.models.build import build_chunk, padded_vocab_size, transformer_config
from megatron_eve.models.decoder.intermediate_features import FeatureProjection
from megatron_eve.models.process_groups import initialize_distributed, model_parallel
from megatron_eve.models.registry import find_family


@dataclass(frozen=True)
class Entry:
    """One tensor of a model.

    Attributes:
        name: global name of the parameter, which the rules of `checkpoint/hf/rules.py` know.
        key: its key in a checkpoint.
        shape: of the whole tensor.
    """

    name: str
    key: str
    shape: torch.Size


class MetaModel:
    """A whole model on torch's meta device.

    Attributes:
        entries: its tensors, in the order of the model.
        padded_vocab_size: rows of its vocabulary.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config, self._transformer = config, transformer_config(config)
        self.padded_vocab_size = padded_vocab_size(config.model.vocab_size, 1)
        with torch.device("meta"):
            self._model = build_chunk(config, self._transformer, transformer_engine=False)
        keys = {
            name: part.key for name, part in self._model.sharded_state_dict(metadata=dict(CONTENT)).items()
        }
        self.entries = [
            Entry(name, keys[name], parameter.shape)
            for name, parameter in self._model.global_named_parameters()
        ]

    def initial(self, seed: int) -> dict[str, torch.Tensor]:
        """Initial weights, by name, of the modules that the family adds to the language model."""
        torch.manual_seed(seed)
        family, config = find_family(self._config.family), self._config
        heads = {objective.module: objective for objective in family.objectives(config)}
        width = next((some.features.width for some in heads.values() if some.features), 0)
        weights = {}
        for path, module in self._model.named_modules():
            new: Any
            if path == "vision_model":
                new = family.front_end(config, self._transformer)
            elif isinstance(module, FeatureProjection):
                new = FeatureProjection(self._transformer, width)
            elif path and path in heads:
                new = heads[path].head(self._transformer)
            else:
                continue
            for name, parameter in new.named_parameters():
                weights[f"{path}.{name}"] = parameter.detach()
        return weights


@contextmanager
def meta_model(config: RunConfig) -> Iterator[MetaModel]:
    """The model of a run on torch's meta device, in this process alone, whatever its layout, precision and stage."""
    config = replace(config, parallel=ParallelConfig(), training=TrainingConfig())
    initialize_distributed(config.parallel)
    try:
        with model_parallel(config):
            yield MetaModel(config)
    finally:
        torch.distributed.destroy_process_group()
