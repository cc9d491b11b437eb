"""The pixel decoder: features of a grid become a picture. Plain torch.

Follows the public code (mit-han-lab/vila-u, whose decoder is that of VQGAN, arXiv 2012.09841), under its names.

Shapes: n = pictures, H x W = grid of features, S = side of the picture.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from megatron_eve.models.vila_u.tower_settings import GROUPS, DecoderSizes

_EPSILON = 1e-6


class PixelDecoder(nn.Module):
    """Convolutions from the grid to the picture, a level at a time."""

    def __init__(self, settings: DecoderSizes) -> None:
        """Random weights."""
        super().__init__()
        channels = settings.ch * settings.ch_mult[-1]
        self.conv_in = nn.Conv2d(settings.z_channels, channels, 3, padding=1)
        self.mid = nn.Module()
        self.mid.block_1 = _ResidualBlock(channels, channels)
        self.mid.attn_1 = _Attention(channels)
        self.mid.block_2 = _ResidualBlock(channels, channels)
        self.up = nn.ModuleList()
        side = settings.grid
        for level in reversed(range(len(settings.ch_mult))):
            stage, width = nn.Module(), settings.ch * settings.ch_mult[level]
            stage.block, stage.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(settings.num_res_blocks + 1):
                stage.block.append(_ResidualBlock(channels, width))
                channels = width
                if side in settings.attn_resolutions:
                    stage.attn.append(_Attention(channels))
            if level:
                stage.upsample = nn.Module()
                stage.upsample.conv = nn.Conv2d(channels, channels, 3, padding=1)
                side *= 2
            self.up.insert(0, stage)
        self.norm_out = nn.GroupNorm(GROUPS, channels, eps=_EPSILON)
        self.conv_out = nn.Conv2d(channels, settings.out_ch, 3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[n, z_channels, H, W] -> [n, 3, S, S], about -1 .. 1."""
        hidden = self.conv_in(features)
        hidden = self.mid.block_2(self.mid.attn_1(self.mid.block_1(hidden)))  # type: ignore[operator]
        for level in reversed(range(len(self.up))):
            stage = self.up[level]
            for number, block in enumerate(stage.block):  # type: ignore[arg-type]
                hidden = block(hidden)
                if len(stage.attn):  # type: ignore[arg-type]
                    hidden = stage.attn[number](hidden)  # type: ignore[index, operator]
            if level:
                hidden = functional.interpolate(hidden, scale_factor=2.0, mode="nearest")
                hidden = stage.upsample.conv(hidden)  # type: ignore[union-attr, operator]
        return self.conv_out(functional.silu(self.norm_out(hidden)))  # type: ignore[no-any-return]


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels, eps=_EPSILON)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, width, eps=_EPSILON)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if channels != width:
            self.nin_shortcut = nn.Conv2d(channels, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(functional.silu(self.norm1(x)))
        hidden = self.conv2(functional.silu(self.norm2(hidden)))
        return hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=_EPSILON)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        query, key, value = (part(normed).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        hidden = functional.scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(hidden.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]
