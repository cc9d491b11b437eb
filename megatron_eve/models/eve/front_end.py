"""The EVE front end as a Megatron pre-process module: patches in, rows of decoder width out.

The patch embedding is replicated over the tensor-parallel ranks: each computes it on the same patches, so its
gradients agree without a collective. The projector, which holds 70 % of the front end's parameters, is tensor
parallel.

Initial weights are those of a published stage 1: class and row-end embedding from N(0, 1), everything else as torch's
own layers begin, weights and biases from U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)).

Shapes: P = patches, I = images, V = image rows (1 + rows * (columns + 1) an image), C = patch embedding width,
D = decoder width.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.models.eve.patch_embedding import PatchEmbedding
from megatron_eve.models.model_parts import VisualInputs
from megatron_eve.models.projector import MLPProjector
from megatron_eve.models.replicated import replicated


class EVEFrontEnd(MegatronModule):
    """Patch embedding layer and projector (`vision_tower` and `mm_projector` of the published model)."""

    def __init__(self, config: TransformerConfig, vision: EVEConfig) -> None:
        super().__init__(config=config)
        embedding = PatchEmbedding(vision.patch_embedding_size, vision.patch_embedding_heads)
        self.patch_embedding = replicated(embedding, config)
        self.projector = MLPProjector(config, vision.patch_embedding_size)

    def forward(self, inputs: VisualInputs) -> torch.Tensor:
        """Embed the images of a pack.

        Args:
            inputs: with the view "patches", uint8 [P, 588] in 2x2 order (see `geometry`).

        Returns:
            [V, D], image after image: CLS, then each row of patches with its row-end token.
        """
        return self.projector(self.patch_embedding(inputs.pixels["patches"], inputs.grids))
