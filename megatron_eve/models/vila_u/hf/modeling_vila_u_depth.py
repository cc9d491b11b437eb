"""VILA-U's depth transformer: the codes of a position, one after another, from the hidden state before it.

Shapes: D = codes of a position, K = size of a codebook, F = width of its vectors, H = width of the decoder, R =
positions that are predicted, E = width of the depth transformer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_vila_u import VILAUConfig


class DepthAttention(nn.Module):
    """Attention of each depth to those before it and itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden: Tensor, cache: list[Tensor] | None) -> Tensor:
        """[R, D, E] -> the same; with the cache of a block, which grows, the next depth alone: [R, 1, E]."""
        q, k, v = (
            part(hidden).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
            cache[:] = [k, v]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        return self.proj(attended.transpose(1, 2).flatten(2))


class DepthBlock(nn.Module):
    """Attention and an MLP, each behind a norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = DepthAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor, cache: list[Tensor] | None) -> Tensor:
        """See `DepthAttention.forward`."""
        hidden = hidden + self.attn(self.ln1(hidden), cache)
        return hidden + self.mlp(self.ln2(hidden))


class DepthBlocks(nn.Module):
    """All blocks, under their published name."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DepthBlock(width, heads) for _ in range(layers))


class Classifier(nn.Module):
    """A norm and logits of the codes, the same for all depths."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.layer_norm, self.linear = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., E] -> [..., K]."""
        return self.linear(self.layer_norm(hidden))


class DepthTransformer(nn.Module):
    """Codes of positions from their hidden states, each from the codes before it; published names."""

    def __init__(self, config: VILAUConfig, vector: int, depth: int) -> None:
        super().__init__()
        sizes: Any = config.depth_config
        width, head = sizes["embed_dim"], sizes["head"]
        self.in_mlp_1, self.in_mlp_2 = nn.Linear(vector, width), nn.Linear(config.hidden_size, width)
        self.pos_emb_d = nn.Parameter(torch.zeros(1, depth, width))
        self.head_transformer = DepthBlocks(width, head["block"]["n_head"], head["n_layer"])
        self.classifier_mlp = Classifier(width, sizes["vocab_size"])

    def forward(self, hidden: Tensor, sums: Tensor) -> Tensor:
        """Logits [R, D, K].

        Args:
            hidden: [R, H], of the rows before the positions.
            sums: [R, D - 1, F], of the vectors of the first 1 .. D - 1 codes.
        """
        others = self.in_mlp_1(sums.to(self.in_mlp_1.weight.dtype))
        tokens = torch.cat([self.in_mlp_2(hidden)[:, None], others], dim=1) + self.pos_emb_d
        for block in self.head_transformer.blocks:
            tokens = block(tokens, None)
        return self.classifier_mlp(tokens)

    def step(self, inputs: Tensor, depth: int, caches: list[list[Tensor]]) -> Tensor:
        """Logits [R, K] of one depth, counted from 0, where the depths before it went through the same caches.

        Args:
            inputs: hidden states [R, H] at depth 0; after it sums [R, F] of the codes so far.
            depth: which.
            caches: of each block, empty lists at depth 0.
        """
        layer = self.in_mlp_1 if depth else self.in_mlp_2
        token = layer(inputs.to(layer.weight.dtype))[:, None] + self.pos_emb_d[:, depth : depth + 1]
        for block, cache in zip(self.head_transformer.blocks, caches):  # noqa: B905
            token = block(token, cache)
        return self.classifier_mlp(token)[:, 0]
