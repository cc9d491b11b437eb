"""What projectors of several families share: tensor-parallel matrices that begin as torch's own layers do.

A projector's input is a full copy on every tensor-parallel rank, so its configuration is the decoder's without sequence
parallelism. torch draws weights and biases from U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig


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
    projector.init_method = torch_default(input_size)
    projector.output_layer_init_method = torch_default(config.hidden_size)
    return projector


def torch_default(fan_in: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """How torch.nn.Linear draws weight and bias alike (its kaiming-uniform with a = sqrt(5) is this).

    The bound is of the whole matrix: on a GPU megatron-core draws each rank's shard by itself, and a shard of a
    row-parallel matrix would be taken for a narrower one.
    """
    return partial(torch.nn.init.uniform_, a=-(fan_in**-0.5), b=fan_in**-0.5)


def draw_bias(linear: ColumnParallelLinear | RowParallelLinear, held: int) -> None:
    """Draw a bias, which megatron-core begins at zero.

    The whole of it is drawn on the CPU, where tensor-parallel ranks are at the same random number, on GPUs too: each
    takes its share, or all of the bias of a row-parallel matrix.

    Args:
        linear: of the projector.
        held: elements that this rank holds.
    """
    whole = torch_default(linear.input_size)(torch.empty(linear.output_size, device="cpu"))
    first = linear.tp_group.rank() * held if held < linear.output_size else 0
    with torch.no_grad():
        linear.bias.copy_(whole[first : first + held])
