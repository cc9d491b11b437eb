"""VILA-U's objective beside the next token: the codes of the pictures that are to be drawn. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_eve.config.schema import RunConfig
from megatron_eve.models.model_parts import Pack, SampleCounts

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_eve.models.vila_u.visual_head import VisualHead, VisualHeadInputs, VisualRows


@dataclass(frozen=True)
class VisualLoss:
    """Cross entropy of each code of each position that is to be drawn; see `FamilyObjective`.

    Its step's mean is over positions and depths, as in the public code.
    """

    config: RunConfig
    name: ClassVar[str] = "visual loss"
    module: ClassVar[str] = "visual_head"
    features: ClassVar[None] = None
    gathers_rows: ClassVar[bool] = True
    adds_over_tensor_parallel: ClassVar[bool] = False

    @property
    def columns(self) -> list[str]:
        """One for each depth, from 1."""
        return [f"{self.name} depth {depth + 1}" for depth in range(self.config.vision.codes_per_position)]

    @property
    def weight(self) -> float:
        """Of this loss in the sum of all."""
        weight: float = self.config.vision.visual_loss_weight
        return weight

    def count(self, counts: SampleCounts) -> int:
        """One for each code."""
        depth: int = self.config.vision.codes_per_position
        return counts.visual_labels * depth

    def head(self, transformer: TransformerConfig) -> VisualHead:
        """The depth transformer, with the codebook."""
        from megatron_eve.models.vila_u.visual_head import VisualHead

        return VisualHead(transformer, self.config.vision)

    def target_model(self) -> None:
        """The codes are in the pack."""
        return None

    def rows(self, pack: Pack, sequence_parallel: bool) -> VisualRows:
        """Rows that predict codes, among all rows of this context-parallel rank."""
        from megatron_eve.models.vila_u.visual_head import visual_rows

        return visual_rows(pack)

    def inputs(self, pack: Pack, rows: VisualRows, targets: torch.Tensor | None) -> VisualHeadInputs | None:
        """Rows that predict codes, and these codes; None for a pack without codes, as when generating."""
        if pack.codes is None:
            return None
        from megatron_eve.models.vila_u.visual_head import visual_head_inputs

        return visual_head_inputs(pack, rows)
