"""Settings of LoRA, the section `lora` of a run's configuration: adapters beside the decoder's frozen matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_eve.config.flag_types import Flag, Words

# The matrices of a decoder layer that may have an adapter, as transformers and peft name them.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA: small adapters train beside the decoder's matrices, which are frozen (arXiv 2106.09685)."""

    # Unknown keys in a recipe are errors (read by pydantic in recipe.py).
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    lora_rank: Annotated[int | None, Flag(unset="no adapters")] = None
    """Train adapters of this rank (64, say) in place of the decoder's own weights, its embedding and its output layer;
    what the model family adds to the decoder trains as the stage says."""
    lora_alpha: float = 16.0
    """Scale of the adapters: what an adapter adds is multiplied by --lora-alpha / --lora-rank."""
    lora_dropout: float = 0.05
    """Share of the values of an adapter's input that are set to 0 in training."""
    lora_target: Annotated[Words, Flag("MODULE")] = TARGETS
    """Matrices of each decoder layer that get an adapter."""

    @property
    def enabled(self) -> bool:
        """Does the model have adapters?"""
        return self.lora_rank is not None

    @property
    def scale(self) -> float:
        """What the output of an adapter is multiplied by."""
        assert self.lora_rank is not None
        return self.lora_alpha / self.lora_rank
