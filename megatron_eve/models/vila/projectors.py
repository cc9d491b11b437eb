"""VILA's projectors: features of the vision tower to rows of the decoder.

Each takes [I, g * g, C], the features of I pictures row by row, and gives [I, rows, D]. Input and output are whole on
every tensor-parallel rank; matrices are spread over these ranks, norms and what is said to be replicated are not.

Shapes: I = pictures, g = features along a side, C = width of the tower, D = width of the decoder, Q = learned queries.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.nn import functional

from megatron_eve.models.projector import GatheredLinear, MLPProjector
from megatron_eve.models.replicated import replicated
from megatron_eve.models.vila.config import VILAConfig
from megatron_eve.models.vila.flops import QFORMER_LAYERS, QFORMER_MLP


def build_projector(config: TransformerConfig, vision: VILAConfig) -> nn.Module:
    """The projector of a configuration, [I, g * g, C] -> [I, rows, D].

    Args:
        config: the decoder's.
        vision: names the projector and its sizes.
    """
    width = vision.vision_hidden_size
    # The others give their rows row by row, whatever the setting.
    by_column = vision.projector_type == "mlp_downsample" and vision.projector_token_order == "column"
    match vision.projector_type:
        case "linear":
            return LinearProjector(config, width)
        case "mlp2x_gelu":
            return MLPProjector(config, width)
        case "mlp3x_gelu":
            return DeeperMLPProjector(config, width)
        case "mlp_downsample" | "mlp_downsample_2x2_fix" | "mlp_downsample_3x3_fix":
            return DownsamplingProjector(config, width, vision.block, by_column)
        case "qformer":
            return QFormerProjector(
                config, width, vision.vision_num_attention_heads, vision.qformer_num_queries
            )


class LinearProjector(MegatronModule):
    """`linear`: an affine map of each feature."""

    def __init__(self, config: TransformerConfig, width: int) -> None:
        super().__init__(config=config)
        self.encoder = GatheredLinear(config, width, config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """See above."""
        return self.encoder(features)


class DeeperMLPProjector(MLPProjector):
    """`mlp3x_gelu`: three matrices with exact GELU between them."""

    def __init__(self, config: TransformerConfig, width: int) -> None:
        super().__init__(config, config.hidden_size)
        self.input = GatheredLinear(config, width, config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """See above."""
        return super().forward(functional.gelu(self.input(features)))


class DownsamplingProjector(MLPProjector):
    """`mlp_downsample` and its relatives: blocks of k x k features, a norm, then the MLP.

    With k = 3 another matrix and norm stand in front of the MLP, which bring a block of 9 C down to 3 C.
    """

    def __init__(self, config: TransformerConfig, width: int, side: int, by_column: bool = False) -> None:
        """A projector.

        Args:
            config: the decoder's.
            width: C.
            side: k.
            by_column: give the blocks of a picture column after column.
        """
        block = side**2 * width
        reduced = 3 * width if side == 3 else block
        super().__init__(config, reduced)
        self.side, self.by_column = side, by_column
        self.norm = replicated(nn.LayerNorm(block), config)
        if side == 3:
            self.reduction = GatheredLinear(config, block, reduced)
            self.reduced_norm = replicated(nn.LayerNorm(reduced), config)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """See above."""
        hidden = self.norm(blocks(features, self.side, self.by_column))
        if self.side == 3:
            hidden = self.reduced_norm(functional.gelu(self.reduction(hidden)))
        return super().forward(hidden)


def blocks(features: torch.Tensor, side: int, by_column: bool = False) -> torch.Tensor:
    """Blocks of k x k features of a square grid, which is padded with zeros at the bottom and right.

    Args:
        features: [I, g * g, C].
        side: k.
        by_column: order of the blocks; in a block, features always lie row after row.

    Returns:
        [I, n * n, k * k * C], n = g / k rounded up.
    """
    pictures, positions, width = features.shape
    grid = round(positions**0.5)
    count = -(-grid // side)
    margin = count * side - grid
    padded = functional.pad(features.view(pictures, grid, grid, width), (0, 0, 0, margin, 0, margin))
    cut = padded.view(pictures, count, side, count, side, width)
    order = (0, 3, 1, 2, 4, 5) if by_column else (0, 1, 3, 2, 4, 5)
    return cut.permute(order).reshape(pictures, count**2, side**2 * width)


class QFormerProjector(MegatronModule):
    """`qformer`: learned queries that attend to the features, then an affine map to the decoder's width.

    The paper calls it a Transformer projector and gives no more. This one is like BLIP-2's (arXiv 2301.12597): two
    blocks of self-attention among the queries, attention to the features, and an MLP, of the tower's width and heads.
    Norms stand in front of each. The blocks are replicated over the tensor-parallel ranks: they hold less than a layer
    of the decoder, and need no collective.
    """

    def __init__(self, config: TransformerConfig, width: int, heads: int, queries: int) -> None:
        """A projector.

        Args:
            config: the decoder's.
            width: C.
            heads: of attention.
            queries: Q, rows of a picture.
        """
        super().__init__(config=config)
        drawn = torch.empty(queries, width).normal_(std=0.02)  # as BLIP-2's
        self.queries = nn.Parameter(drawn)
        self.features_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(_QFormerLayer(width, heads) for _ in range(QFORMER_LAYERS))
        self.norm = nn.LayerNorm(width)
        replicated(self, config)
        self.encoder = GatheredLinear(config, width, config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """See above."""
        count = len(features)
        if not count:  # kernels of attention refuse an empty batch
            features = torch.cat([features, features.new_zeros(1, *features.shape[1:])])
        hidden, features = self.queries.expand(len(features), -1, -1), self.features_norm(features)
        for layer in self.layers:
            hidden = layer(hidden, features)
        return self.encoder(self.norm(hidden[:count]))


class _QFormerLayer(nn.Module):
    """A block: hidden states of the queries [I, Q, C] and normed features [I, g * g, C] -> [I, Q, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attention_norm = nn.LayerNorm(width)
        self.self_attention = _Attention(width, heads)
        self.cross_attention_norm = nn.LayerNorm(width)
        self.cross_attention = _Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        inner = QFORMER_MLP * width
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, hidden: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        normed = self.self_attention_norm(hidden)
        hidden = hidden + self.self_attention(normed, normed)
        hidden = hidden + self.cross_attention(self.cross_attention_norm(hidden), features)
        return hidden + self.mlp(self.mlp_norm(hidden))


class _Attention(nn.Module):
    """Attention of [I, Q, C] to [I, n, C]. Four matrices with biases, which begin as torch's own layers do."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            projected.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(queries), self.k_proj(others), self.v_proj(others))
        )
        attended = functional.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).flatten(2))
