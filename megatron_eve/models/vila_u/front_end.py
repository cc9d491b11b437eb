"""VILA-U's front end as a Megatron pre-process module: codes to rows of the sequence, by codebook and projector."""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_eve.models.model_parts import VisualInputs
from megatron_eve.models.projector import MLPProjector
from megatron_eve.models.vila_u.codebook import FrozenCodebook
from megatron_eve.models.vila_u.config import VILAUConfig


class CodeFrontEnd(MegatronModule):
    """Frozen codebook and projector (`mm_projector` of the published models)."""

    def __init__(self, config: TransformerConfig, vision: VILAUConfig) -> None:
        """Build both; `config` is the decoder's."""
        super().__init__(config=config)
        self.codebook = FrozenCodebook(config, vision)
        self.projector = MLPProjector(config, vision.code_vector_size)

    def forward(self, inputs: VisualInputs) -> torch.Tensor:
        """Embed the images of a pack.

        Args:
            inputs: with `codes` int64 [V, D].

        Returns:
            [V, D_model] on every rank that shares the pack, image after image.
        """
        assert inputs.codes is not None, "the first stage reads the codes of all images"
        sums = self.codebook.embed(inputs.codes.reshape(-1, self.codebook.depth))  # (V, F)
        rows: torch.Tensor = self.projector(sums.to(self.projector.encoder.linear_fc1.weight.dtype))
        return rows
