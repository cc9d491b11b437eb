"""What turns visual features into rows of decoder width: linear layers and an MLP over the tensor-parallel ranks.

Their input is a full copy on every rank (never sequence parallel), and so is their output. So the configuration is the
decoder's with sequence parallelism off, and the gradient of the input is the same on all tensor-parallel ranks.

Weights and biases begin as those of torch's own layers, from U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig


class MLPProjector(MultimodalProjector):
    """`mlp2x_gelu` of published models: [..., input_size] -> [..., D] by two matrices with exact GELU between them."""

    def __init__(self, config: TransformerConfig, input_size: int) -> None:
        """An MLP whose inner width is the decoder's.

        Args:
            config: the decoder's.
            input_size: width of the features.
        """
        super().__init__(
            projector_config(config, input_size),
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            "mlp",
            input_size,
        )
        _draw_bias(self.encoder.linear_fc1)
        _draw_bias(self.encoder.linear_fc2)


class GatheredLinear(ColumnParallelLinear):
    """A linear layer: each tensor-parallel rank computes a part of the outputs, and all get the whole."""

    def __init__(self, config: TransformerConfig, input_size: int, output_size: int) -> None:
        """[..., input_size] -> [..., output_size]; `config` is the decoder's."""
        super().__init__(
            input_size,
            output_size,
            config=projector_config(config, input_size),
            init_method=_torch_default(input_size),
            gather_output=True,
        )
        _draw_bias(self)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """See above."""
        return super().forward(features)[0]


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


def _draw_bias(linear: ColumnParallelLinear | RowParallelLinear) -> None:
    """Draw a bias, which megatron-core begins at zero.

    The whole of it is drawn on the CPU, where tensor-parallel ranks are at the same random number, on GPUs too: each
    takes its share, or all of the bias of a row-parallel matrix.
    """
    whole = _torch_default(linear.input_size)(torch.empty(linear.output_size, device="cpu"))
    held = len(linear.bias)
    first = linear.tp_group.rank() * held if held < linear.output_size else 0
    with torch.no_grad():
        linear.bias.copy_(whole[first : first + held])
