"""What a model's tensors are called and how large they are, from the model itself, built without data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_eve.checkpoint.state import CONTENT
from megatron_eve.config import ParallelConfig, RunConfig, TrainingConfig
from megatron_eve.models.build import padded_vocab_size, transformer_config
from megatron_eve.models.decoder.model import VisionLanguageModel
from megatron_eve.models.process_groups import initialize_distributed, model_parallel
from megatron_eve.models.registry import find_family


@dataclass(frozen=True)
class Entry:
    """One tensor of a model.

    Attributes:
        name: global name of the parameter, which the rules of `checkpoint/hf/rules.py` know.
        key: what a checkpoint calls it.
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
            self._model = _whole_model(config, self._transformer, self.padded_vocab_size)
        keys = {
            name: part.key for name, part in self._model.sharded_state_dict(metadata=dict(CONTENT)).items()
        }
        self.entries = [
            Entry(name, keys[name], parameter.shape)
            for name, parameter in self._model.global_named_parameters()
        ]

    def initial(self, seed: int) -> dict[str, torch.Tensor]:
        """Initial weights, by name, of what no language model has: the modules that the family adds."""
        torch.manual_seed(seed)
        family = find_family(self._config.family).hugging_face()
        found = {}
        for path, module in self._model.named_modules():
            new = family.new_module(module, self._transformer, self._config.vision)
            if new is None:
                continue
            for name, parameter in new.named_parameters():
                found[f"{path}.{name}"] = parameter.detach()
        return found


def _whole_model(config: RunConfig, transformer: TransformerConfig, padded_vocab: int) -> VisionLanguageModel:
    """All layers in one model, of megatron-core's own modules."""
    return VisionLanguageModel(
        transformer,
        config,
        padded_vocab_size=padded_vocab,
        transformer_engine=False,
        patch_aligning=config.vision.patch_aligning,
    )


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
