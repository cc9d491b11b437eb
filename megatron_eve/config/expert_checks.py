"""What a decoder with experts (`--modality-experts`) does not go with. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_eve.config.schema import RunConfig
from megatron_eve.models.registry import find_family


def expert_errors(config: RunConfig) -> Iterator[str]:
    """Errors, each with its flag and the remedy."""
    if not config.model.modality_experts:
        return
    training = config.training
    if objectives := find_family(config.family).objectives(config):
        names = " and ".join(objective.name for objective in objectives)
        yield (
            f"--modality-experts: {names} of --family {config.family} would read rows in the order of the experts; "
            "leave it out, or use a family without such a loss"
        )
    if config.lora.enabled:
        yield "--lora-rank: adapters are of decoders without experts; leave it out, or train without --modality-experts"
    if training.fp8_format is not None:
        yield (
            f"--fp8-format {training.fp8_format}: matrices of experts are megatron-core's own, which compute in "
            "bfloat16; leave it out"
        )
    if "mlp" in training.recompute_modules:
        yield (
            "--recompute-modules mlp: an MLP with experts is not recomputed by itself; use core_attn, or "
            "--recompute-granularity full"
        )
    if config.parallel.tp_comm_overlap:
        yield (
            "--tp-comm-overlap: is of TransformerEngine's matrices, and those of experts are megatron-core's own; "
            "leave it out"
        )
