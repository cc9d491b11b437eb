"""What of the model trains in the stage of a run, as its family says."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_eve.config import RunConfig
from megatron_eve.models.family import ADAPTER_PARAMETERS, Stage
from megatron_eve.models.registry import find_family

if TYPE_CHECKING:
    from megatron_eve.models.decoder.model import VisionLanguageModel


def stage_of(config: RunConfig) -> Stage:
    """The stage that a run trains; with adapters, of the language model these alone (`--lora-rank`)."""
    family = find_family(config.family)
    stage = family.stage(config)
    if not config.lora.enabled:
        return stage
    parts = [pattern for patterns in family.parts.values() for pattern in patterns]
    return replace(stage, among=(ADAPTER_PARAMETERS, *parts))


def freeze_untrained(chunk: VisionLanguageModel, stage: Stage) -> None:
    """Freeze every parameter of a bare model chunk that this stage does not train."""
    for name, parameter in chunk.global_named_parameters():
        if not stage.trains(name):
            parameter.requires_grad_(False)
