"""VILA's projectors: features of the vision tower to rows of the decoder (NVlabs/VILA, `multimodal_projector`).

All are tensor parallel: first matrices are split by output, last ones by input; norms are copies on every rank. The
input is a whole copy on every rank, too. Initial weights are torch's.

Shapes: I = pictures, G = side of the grid of features, C = width of the tower, D = decoder width, k = side of a block
(2 or 3; 1 without blocks), Q = rows of a picture.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megatron_eve.models.projector import draw_bias, projector_config, torch_default
from megatron_eve.models.vila.config import VILAConfig

# Side of a block of features that becomes one row, of projectors that join some.
BLOCKS = {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}
_EPSILON = 1e-5


class Projector(MegatronModule):
    """The projector that `--projector-type` names.

    Args:
        config: the decoder's.
        vision: says which, and the sizes of the tower.
    """

    def __init__(self, config: TransformerConfig, vision: VILAConfig) -> None:
        super().__init__(config=config)
        kind, width = vision.projector_type, vision.vision_hidden_size
        self.grid = vision.grid
        self.block = BLOCKS.get(kind, 1)
        self.by_columns = vision.projector_token_order == "column"
        width *= self.block**2
        if self.block > 1:
            self.norm = _layer_norm(width, config)
        if kind == "mlp3x_gelu":
            self.input = _gathered(config, width, config.hidden_size)
            width = config.hidden_size
        if self.block == 3:
            self.reduction = _gathered(config, width, width // 3)
            width //= 3
            self.reduced_norm = _layer_norm(width, config)
        if kind == "linear":
            self.encoder = _gathered(config, width, config.hidden_size)
        else:
            self.encoder = _mlp(config, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Rows of pictures.

        Args:
            features: [I * G * G, C], picture after picture, row by row; on every tensor-parallel rank.

        Returns:
            [I * Q, D], picture after picture; Q = ceil(G / k) ** 2.
        """
        hidden = features
        if self.block > 1:
            grids = features.view(-1, self.grid, self.grid, features.shape[-1])
            hidden = self.norm(blocks(grids, self.block, self.by_columns).flatten(0, 1))
        if hasattr(self, "input"):
            hidden = functional.gelu(self.input(hidden)[0])
        if hasattr(self, "reduction"):
            hidden = self.reduced_norm(functional.gelu(self.reduction(hidden)[0]))
        rows, bias = self.encoder(hidden)
        return rows if bias is None else rows + bias


def blocks(grids: torch.Tensor, side: int, by_columns: bool = False) -> torch.Tensor:
    """Join blocks of side x side features; zeros fill the last blocks of a grid that they do not divide.

    Args:
        grids: [I, G, G, C].
        side: k.
        by_columns: emit the blocks column by column, as VILA-1.5 does.

    Returns:
        [I, Q, k * k * C]; in a block the features row by row.
    """
    missing = -grids.shape[1] % side
    grids = functional.pad(grids, (0, 0, 0, missing, 0, missing))
    count, width = grids.shape[1] // side, grids.shape[3]
    cut = grids.view(-1, count, side, count, side, width)
    order = (0, 3, 1, 2, 4, 5) if by_columns else (0, 1, 3, 2, 4, 5)
    return cut.permute(order).reshape(len(grids), count**2, side**2 * width)


def _layer_norm(width: int, config: TransformerConfig) -> torch.nn.LayerNorm:
    norm = torch.nn.LayerNorm(width, eps=_EPSILON, dtype=config.params_dtype)
    return norm if config.use_cpu_initialization else norm.cuda()


def _gathered(config: TransformerConfig, inputs: int, outputs: int) -> ColumnParallelLinear:
    """A matrix that is split by output, and whose output every rank gets whole."""
    linear = ColumnParallelLinear(
        inputs,
        outputs,
        config=projector_config(config, inputs),
        init_method=torch_default(inputs),
        gather_output=True,
        bias=True,
    )
    draw_bias(linear, linear.output_size_per_partition)
    return linear


def _mlp(config: TransformerConfig, inputs: int) -> Any:
    """Two matrices with an exact GELU between them, D wide."""
    mlp = MLP(
        projector_config(config, inputs),
        MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        input_size=inputs,
    )
    draw_bias(mlp.linear_fc1, mlp.linear_fc1.output_size_per_partition)
    draw_bias(mlp.linear_fc2, mlp.linear_fc2.output_size)
    return mlp
