"""Errors of the settings of LoRA, and how many parameters its adapters have. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_eve.config.errors import at_least_one
from megatron_eve.config.lora import TARGETS, LoRAConfig
from megatron_eve.config.schema import ModelConfig, RunConfig
from megatron_eve.models.registry import find_family


def lora_errors(config: RunConfig) -> Iterator[str]:
    """Errors of the settings of LoRA, one line each, with flag and remedy."""
    lora = config.lora
    yield from at_least_one(lora, "lora_rank")
    if not lora.enabled:
        for name in ("lora_alpha", "lora_dropout", "lora_target"):
            if getattr(lora, name) != getattr(LoRAConfig, name):
                yield f"--{name.replace('_', '-')}: only used with --lora-rank; add that, or leave it out"
        return
    if lora.lora_alpha <= 0:
        yield f"--lora-alpha {lora.lora_alpha:g}: must be above 0"
    if not 0 <= lora.lora_dropout < 1:
        yield f"--lora-dropout {lora.lora_dropout:g}: must lie in [0, 1)"
    if not lora.lora_target:
        yield f"--lora-target: name at least one matrix: {', '.join(TARGETS)}"
    for name in dict.fromkeys(lora.lora_target):
        if name not in TARGETS:
            yield f"--lora-target {name}: no such matrix of a layer; choose from {', '.join(TARGETS)}"
        elif lora.lora_target.count(name) > 1:
            yield f"--lora-target {name}: is named more than once; leave the others out"
    flag, training = f"--lora-rank {lora.lora_rank}", config.training
    if training.fp8_format is not None:
        yield f"{flag}: adapters train in bfloat16 or float32; leave --fp8-format out"
    if config.parallel.tp_comm_overlap:
        yield f"{flag}: adapters have no overlap with communication; leave --tp-comm-overlap out"
    family = find_family(config.family)
    if training.stage in family.stages:
        stage = family.stage(config)
        if not stage.decoder_trains:
            yield (
                f"{flag}: adapters take the place of a decoder that trains, and --stage {training.stage} "
                f"({stage.name}) of this run freezes it, so that no adapter would train; leave --lora-rank out, or "
                "choose a stage (and settings) in which the decoder trains"
            )


def projection_sizes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the matrices of a decoder layer, by their names in `TARGETS`."""
    width, inner = model.hidden_size, model.ffn_hidden_size
    groups = model.num_query_groups or model.num_attention_heads
    keys = width // model.num_attention_heads * groups
    return {
        "q_proj": (width, width),
        "k_proj": (width, keys),
        "v_proj": (width, keys),
        "o_proj": (width, width),
        "gate_proj": (width, inner),
        "up_proj": (width, inner),
        "down_proj": (inner, width),
    }


def adapter_parameters(model: ModelConfig, lora: LoRAConfig, tensor_parallel: int = 1) -> int:
    """Parameters of the adapters of one layer on a tensor-parallel rank.

    Args:
        model: sizes of the decoder.
        lora: without a rank there are no adapters.
        tensor_parallel: ranks that share the longer side of the split matrices of each adapter.
    """
    count = 0
    for name in lora.lora_target if lora.lora_rank is not None else ():
        inputs, outputs = projection_sizes(model)[name]
        split, whole = (inputs, outputs) if name in ("o_proj", "down_proj") else (outputs, inputs)
        count += (lora.lora_rank or 0) * (split // tensor_parallel + whole)
    return count
