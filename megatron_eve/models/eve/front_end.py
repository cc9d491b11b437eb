"""The EVE front end as a Megatron pre-process module: patches in, rows of decoder width out.

The patch embedding is replicated over the tensor-parallel ranks: each computes it on the same patches, so its
gradients agree without a collective. The projector, which holds 70 % of the front end's parameters, is tensor
parallel. Its input is a full copy on every rank (never sequence parallel), so its configuration is the
decoder's with sequence parallelism off.

Shapes: P = patches, I = images, V = image rows (1 + rows * (columns + 1) an image), C = patch embedding width,
D = decoder width.
"""

from __future__ import annotations

import copy

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_eve.config import ModelConfig
from megatron_eve.models.eve.patch_embedding import PatchEmbedding


class EVEFrontEnd(MegatronModule):
    """Patch embedding layer and projector (`vision_tower` and `mm_projector` of the published model)."""

    def __init__(self, config: TransformerConfig, model: ModelConfig) -> None:
        super().__init__(config=config)
        self.patch_embedding = PatchEmbedding(model.patch_embedding_size, model.patch_embedding_heads)
        self.patch_embedding.to(dtype=config.params_dtype)
        if not config.use_cpu_initialization:
            self.patch_embedding.cuda()
        self.projector = MultimodalProjector(
            projector_config(config),
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            projector_type="mlp",
            input_size=model.patch_embedding_size,
        )

    def forward(self, patches: torch.Tensor, image_grids: torch.Tensor) -> torch.Tensor:
        """Embed the images of a microbatch.

        Args:
            patches: uint8 [P, 588] in 2x2 order (see data/images).
            image_grids: int64 [I, 2], rows and columns of tokens of each image.

        Returns:
            [V, D], image after image: CLS, then each row of patches with its row-end token.
        """
        return self.projector(self.patch_embedding(patches, image_grids))


def projector_config(config: TransformerConfig) -> TransformerConfig:
    """The decoder's configuration made into the published `mlp2x_gelu`: D wide, exact GELU, with biases."""
    projector = copy.copy(config)
    projector.sequence_parallel = False
    projector.gated_linear_unit = False
    projector.add_bias_linear = True
    projector.ffn_hidden_size = config.hidden_size
    projector.activation_func = torch.nn.functional.gelu
    projector.bias_activation_fusion = False
    projector.fp8 = None
    return projector
