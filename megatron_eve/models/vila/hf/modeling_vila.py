"""VILA on transformers' LLaVA, with the projectors that LLaVA does not have (NVlabs/VILA, `multimodal_projector`).

Shapes: I = pictures, G = side of the grid of the tower's features, C = width of the tower, D = decoder width, k = side
of a block of features (1, 2 or 3), Q = rows of a picture.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel

from .configuration_vila import VILAConfig


class Blocks(nn.Module):
    """Joins k x k features into one; zeros fill the last blocks of a grid that they do not divide."""

    def __init__(self, side: int, by_columns: bool) -> None:
        super().__init__()
        self.side, self.by_columns = side, by_columns

    def forward(self, features: Tensor) -> Tensor:
        """[I, G * G, C] -> [I, Q, k * k * C]; in a block the features row by row."""
        grid, side = math.isqrt(features.shape[1]), self.side
        missing = -grid % side
        grids = F.pad(features.unflatten(1, (grid, grid)), (0, 0, 0, missing, 0, missing))
        blocks = grids.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (I, rows, k, columns, k, C)
        order = (0, 3, 1, 2, 4, 5) if self.by_columns else (0, 1, 3, 2, 4, 5)
        return blocks.permute(order).flatten(3).flatten(1, 2)


class Attention(nn.Module):
    """Attention of [I, Q, C] to [I, n, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries: Tensor, others: Tensor) -> Tensor:
        """See above."""
        q, k, v = (
            projected.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(queries), self.k_proj(others), self.v_proj(others))
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class QFormerLayer(nn.Module):
    """Attention among the queries, attention to the features, an MLP; a norm in front of each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attention_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        self.cross_attention_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor, features: Tensor) -> Tensor:
        """[I, Q, C], and normed features [I, G * G, C] -> [I, Q, C]."""
        normed = self.self_attention_norm(hidden)
        hidden = hidden + self.self_attention(normed, normed)
        hidden = hidden + self.cross_attention(self.cross_attention_norm(hidden), features)
        return hidden + self.mlp(self.mlp_norm(hidden))


class QFormer(nn.Module):
    """Learned queries that attend to the features in two blocks, then an affine map: [I, G * G, C] -> [I, Q, D]."""

    def __init__(self, width: int, heads: int, queries: int, decoder: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, width).normal_(std=0.02))
        self.features_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(QFormerLayer(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.encoder = nn.Linear(width, decoder)

    def forward(self, features: Tensor) -> Tensor:
        """See above."""
        hidden, features = self.queries.expand(len(features), -1, -1), self.features_norm(features)
        for layer in self.layers:
            hidden = layer(hidden, features)
        return self.encoder(self.norm(hidden))


class VILAProjector(nn.Module):
    """[I, G * G, C] -> [I, Q, D]. Its layers are numbered as published."""

    def __init__(self, config: VILAConfig) -> None:
        super().__init__()
        kind, by_columns = config.mm_projector_type, config.projector_token_order == "column"
        vision: Any = config.vision_config
        text: Any = config.text_config
        tower, decoder = vision.hidden_size, text.hidden_size
        if kind == "linear":
            self.layers: nn.Module = nn.Linear(tower, decoder)
            return
        if kind == "qformer":
            heads = vision.num_attention_heads
            self.layers = QFormer(tower, heads, config.qformer_num_queries, decoder)
            return
        layers: list[nn.Module]
        if kind == "mlp3x_gelu":
            layers = [nn.Linear(tower, decoder), nn.GELU()]
            tower = decoder
        elif kind == "mlp_downsample_3x3_fix":
            layers = [
                Blocks(3, by_columns),
                nn.LayerNorm(9 * tower),
                nn.Linear(9 * tower, 3 * tower),
                nn.GELU(),
            ]
            tower *= 3
            layers.append(nn.LayerNorm(tower))
        elif kind in ("mlp_downsample", "mlp_downsample_2x2_fix"):
            tower *= 4
            layers = [Blocks(2, by_columns), nn.LayerNorm(tower)]
        else:
            raise ValueError(f"mm_projector_type is {kind!r}, which is not known here")
        self.layers = nn.Sequential(
            *layers, nn.Linear(tower, decoder), nn.GELU(), nn.Linear(decoder, decoder)
        )

    def forward(self, image_features: Tensor) -> Tensor:
        """See above."""
        return self.layers(image_features)


class VILAModel(LlavaModel):
    """LLaVA with another projector, without its head."""

    config_class = VILAConfig

    def __init__(self, config: VILAConfig) -> None:
        super().__init__(config)
        projector: Any = VILAProjector(config)
        self.multi_modal_projector = projector
        self.post_init()


class VILAForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with another projector; the keys of its folders are the names of modules in transformers 5."""

    config_class = VILAConfig
    # transformers 4 wraps the tower once more.
    _checkpoint_conversion_mapping = {  # noqa: RUF012
        "^model.vision_tower.(?!vision_model)": "model.vision_tower.vision_model."
    }

    def __init__(self, config: VILAConfig) -> None:
        # LlavaForConditionalGeneration's own would build LLaVA's model first.
        LlavaPreTrainedModel.__init__(self, config)
        self.model = VILAModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()
