"""The EVE front end as a Megatron pre-process module: patches in, rows of decoder width out.

The patch embedding is replicated over the tensor-parallel ranks: each computes it on the same patches, so its
gradients agree without a collective. The projector, which holds 70 % of the front end's parameters, is tensor
parallel. Its input is a full copy on every rank (never sequence parallel), so its configuration is the
decoder's with sequence parallelism off.

Initial weights are those of a published stage 1: class and row-end embedding from N(0, 1), everything else as torch's
own layers begin (`models/projector.py`).

Shapes: P = patches, I = images, V = image rows (1 + rows * (columns + 1) an image), C = patch embedding width,
D = decoder width.
"""

from __future__ import annotations

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.models.eve.patch_embedding import PatchEmbedding
from megatron_eve.models.model_parts import VisualInputs
from megatron_eve.models.projector import draw_bias, projector_config


class EVEFrontEnd(MegatronModule):
    """Patch embedding layer and projector (`vision_tower` and `mm_projector` of the published model)."""

    def __init__(self, config: TransformerConfig, vision: EVEConfig) -> None:
        super().__init__(config=config)
        self.patch_embedding = PatchEmbedding(vision.patch_embedding_size, vision.patch_embedding_heads)
        self.patch_embedding.to(dtype=config.params_dtype)
        if not config.use_cpu_initialization:
            self.patch_embedding.cuda()
        self.projector = MultimodalProjector(
            projector_config(config, vision.patch_embedding_size),
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            projector_type="mlp",
            input_size=vision.patch_embedding_size,
        )
        encoder = self.projector.encoder
        draw_bias(encoder.linear_fc1, encoder.linear_fc1.output_size_per_partition)
        draw_bias(encoder.linear_fc2, encoder.linear_fc2.output_size)

    def forward(self, inputs: VisualInputs) -> torch.Tensor:
        """Embed the images of a pack.

        Args:
            inputs: with the view "patches", uint8 [P, 588] in 2x2 order (see `geometry`).

        Returns:
            [V, D], image after image: CLS, then each row of patches with its row-end token.
        """
        return self.projector(self.patch_embedding(inputs.pixels["patches"], inputs.grids))
