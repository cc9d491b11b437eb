"""What of the model trains in the stage of a run, as its family says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_eve.config import RunConfig
from megatron_eve.models.family import Stage
from megatron_eve.models.registry import find_family

if TYPE_CHECKING:
    from megatron_eve.models.decoder.model import VisionLanguageModel


def stage_of(config: RunConfig) -> Stage:
    """The stage that a run trains."""
    return find_family(config.family).stage(config)


def freeze_untrained(chunk: VisionLanguageModel, stage: Stage) -> None:
    """Freeze every parameter of a bare model chunk that this stage does not train."""
    for name, parameter in chunk.global_named_parameters():
        if not stage.trains(name):
            parameter.requires_grad_(False)
