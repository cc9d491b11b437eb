"""The memory that a rank needs before its first step, from the configuration alone: no torch, no model.

Counted are weights, gradient buffers and optimizer state. Activations, frozen models and communication buffers are not
counted, so a run that does not fit by this count cannot run.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_eve.config.lora_checks import adapter_parameters
from megatron_eve.config.schema import ModelConfig, RunConfig
from megatron_eve.models.registry import find_family, tower_family

_GIB = 2**30
# Rows of the vocabulary are padded to a multiple of this times the tensor-parallel size, as in Megatron-LM.
_VOCABULARY_MULTIPLE = 128
_MOMENTS, _MASTER, _GRADIENT = 8, 4, 4  # bytes a parameter: Adam's two moments, master weights, DDP's buffer


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the decoder, by part.

    Attributes:
        layer: one decoder layer, experts included.
        experts: those of a layer that work on rows of images alone (`--modality-experts`).
        embedding: the token embedding; the output layer has as many.
        norm: the final norm.
    """

    layer: int
    embedding: int
    norm: int
    experts: int = 0


@dataclass(frozen=True)
class RankMemory:
    """Memory in bytes of the rank that needs most, before its first step."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer

    def __str__(self) -> str:
        parts = (
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer state", self.optimizer),
        )
        listed = ", ".join(f"{name} {in_units(size)}" for name, size in parts)
        return f"{in_units(self.total)} a rank ({listed}), activations not counted"


def in_units(size: float) -> str:
    """Bytes as text: in GiB, or in MiB below 1 GiB."""
    return f"{size / _GIB:,.2f} GiB" if size >= _GIB else f"{size / 2**20:,.2f} MiB"


def memory_error(needed: RankMemory, available: float, what: str, decoder: bool = True) -> str | None:
    """The error if a run cannot fit into a rank's memory, with remedies; None if it may fit.

    Args:
        needed: by `rank_memory`.
        available: GiB that a rank has.
        what: name of the memory, for the message.
        decoder: the run trains one, whose layers several ranks can share.
    """
    if needed.total <= available * _GIB:
        return None
    more = " and raise --tensor-model-parallel-size or --pipeline-model-parallel-size" * decoder
    return (
        f"out of memory before the first step: needs {needed}, and a rank has {in_units(available * _GIB)} ({what}); "
        f"start more ranks{more}, or take a smaller model (--preset)"
    )


def count_parameters(model: ModelConfig, tensor_parallel: int = 1) -> ParameterCounts:
    """Count the parameters of a decoder.

    Args:
        model: its sizes.
        tensor_parallel: ranks that share the vocabulary, which decides its padding.
    """
    width = model.hidden_size
    groups = model.num_query_groups or model.num_attention_heads
    queries_keys_values = width + 2 * width * groups // model.num_attention_heads
    layer = (
        queries_keys_values * (width + model.add_qkv_bias)
        + width**2
        + 3 * width * model.ffn_hidden_size
        + 2 * width
    )
    multiple = _VOCABULARY_MULTIPLE * tensor_parallel
    rows = -(-model.vocab_size // multiple) * multiple
    experts = layer * model.modality_experts
    return ParameterCounts(layer + experts, rows * width, width, experts)


def rank_memory(config: RunConfig, world_size: int) -> RankMemory:
    """Memory of the rank that needs most, before its first step.

    Args:
        config: of the run, valid on `world_size` ranks.
        world_size: ranks of the run.
    """
    parallel, training = config.parallel, config.training
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    family = find_family(config.family)
    towers = tower_family(config.family)
    counts = ParameterCounts(0, 0, 0) if towers else count_parameters(config.model, tensor)
    in_float32 = towers.float32_bytes(config) if towers else 0
    parts, decoder_trains = family.parameter_counts(config), family.stage(config).decoder_trains
    experts_train = family.stage(config).experts_train
    adapters = adapter_parameters(config.model, config.lora, tensor)
    shards = world_size // (tensor * pipeline) if parallel.use_distributed_optimizer else 1
    needed = []
    for stage, layers in enumerate(config.stage_layers):
        first, last = stage == 0, stage == pipeline - 1
        decoder = (layers * counts.layer + counts.embedding * (first + last) + counts.norm * last) // tensor
        experts = layers * counts.experts // tensor
        others = parts.first_stage * first + parts.last_stage * last + layers * adapters
        trained = (
            others
            - parts.frozen * first
            - parts.last_frozen * last
            + (decoder - experts) * (decoder_trains and not config.lora.enabled)
            + experts * experts_train
        )
        # Trained in float32 beside --bf16.
        exact = parts.float32 * first * training.bf16
        needed.append(
            RankMemory(
                weights=(decoder + others) * (2 if training.bf16 else 4) + exact * 2 + in_float32,
                gradients=trained * _GRADIENT,
                optimizer=(trained * (_MOMENTS + _MASTER * training.bf16) - exact * _MASTER) // shards,
            )
        )
    return max(needed, key=lambda memory: memory.total)
