"""The EVE front end as a Megatron pre-process module: patches in, rows of decoder width out.

The patch embedding is replicated over the tensor-parallel ranks: each computes it on the same patches, so its
gradients agree without a collective. The projector, which holds 70 % of the front end's parameters, is tensor
parallel. Its input is a full copy on every rank (never sequence parallel), so its configuration is the
decoder's with sequence parallelism off.

Initial weights are those of a published stage 1: class and row-end embedding from N(0, 1), everything else as torch's
own layers begin, weights and biases from U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)).

Shapes: P = patches, I = images, V = image rows (1 + rows * (columns + 1) an image), C = patch embedding width,
D = decoder width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.models.eve.patch_embedding import PatchEmbedding
from megatron_eve.models.model_parts import VisualInputs


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
        _draw_bias(encoder.linear_fc1, encoder.linear_fc1.output_size_per_partition)
        _draw_bias(encoder.linear_fc2, encoder.linear_fc2.output_size)

    def forward(self, inputs: VisualInputs) -> torch.Tensor:
        """Embed the images of a pack.

        Args:
            inputs: with the view "patches", uint8 [P, 588] in 2x2 order (see `geometry`).

        Returns:
            [V, D], image after image: CLS, then each row of patches with its row-end token.
        """
        return self.projector(self.patch_embedding(inputs.pixels["patches"], inputs.grids))


def projector_config(config: TransformerConfig, input_size: int) -> TransformerConfig:
    """The decoder's configuration made into the published `mlp2x_gelu`: D wide, exact GELU, with biases.

    Args:
        config: the decoder's.
        input_size: C, over which the first matrix sums; the second one sums over D.
    """
    projector = copy.copy(config)
    projector.sequence_parallel = False
    projector.gated_linear_unit = False
    projector.add_bias_linear = True
    projector.ffn_hidden_size = config.hidden_size
    projector.activation_func = torch.nn.functional.gelu
    projector.bias_activation_fusion = False
    projector.fp8 = None
    projector.init_method = _torch_default(input_size)
    projector.output_layer_init_method = _torch_default(config.hidden_size)
    return projector


def _torch_default(fan_in: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """How torch.nn.Linear draws weight and bias alike (its kaiming-uniform with a = sqrt(5) is this).

    The bound is of the whole matrix: on a GPU megatron-core draws each rank's shard by itself, and a shard of a
    row-parallel matrix would be taken for a narrower one.
    """
    return partial(torch.nn.init.uniform_, a=-(fan_in**-0.5), b=fan_in**-0.5)


def _draw_bias(linear: ColumnParallelLinear | RowParallelLinear, held: int) -> None:
    """Draw a bias, which megatron-core begins at zero.

    The whole of it is drawn on the CPU, where tensor-parallel ranks are at the same random number, on GPUs too: each
    takes its share, or all of the bias of a row-parallel matrix.

    Args:
        linear: of the projector.
        held: elements that this rank holds.
    """
    whole = _torch_default(linear.input_size)(torch.empty(linear.output_size, device="cpu"))
    first = linear.tp_group.rank() * held if held < linear.output_size else 0
    with torch.no_grad():
        linear.bias.copy_(whole[first : first + held])
