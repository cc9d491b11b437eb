"""VILA-U's tower for transformers (arXiv 2409.04429, mit-han-lab/vila-u): pictures to codes, and codes to pictures.

A SigLIP without its last layer gives features, a residual quantiser makes codes of them, a convolutional decoder makes
pictures of codes. Weights have the names of the published `vision_tower/`; what codes and pictures do not need is left
out (the last encoder layer, the text tower), and a codebook that all depths share is there once.

Shapes: n = pictures, S = side of a picture that is read, P = of one that is made, H x W x C = features, h x w =
positions with codes, D = depth, K = size of a codebook, F = width of its vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput

from .configuration_vila_u_tower import VILAUTowerConfig


class Embeddings(nn.Module):
    """Patches, and where they stand."""

    def __init__(self, config: VILAUTowerConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        patches = (config.image_size // config.patch_size) ** 2
        self.position_embedding = nn.Embedding(patches, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[n, 3, S, S] -> [n, H * W, C]."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return patches + self.position_embedding.weight


class Attention(nn.Module):
    """Attention of all patches to all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, H * W, C] -> the same."""
        q, k, v = (
            part(hidden).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers."""

    def __init__(self, config: VILAUTowerConfig) -> None:
        super().__init__()
        inner = config.intermediate_size
        self.fc1, self.fc2 = nn.Linear(config.hidden_size, inner), nn.Linear(inner, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, H * W, C] -> the same."""
        return self.fc2(self.activation(self.fc1(hidden)))


class EncoderLayer(nn.Module):
    """A layer of the SigLIP."""

    def __init__(self, config: VILAUTowerConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, H * W, C] -> the same."""
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class Layers(nn.Module):
    """The encoder's layers."""

    def __init__(self, config: VILAUTowerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))


class VisionModel(nn.Module):
    """The SigLIP without its last layer."""

    def __init__(self, config: VILAUTowerConfig) -> None:
        super().__init__()
        self.embeddings, self.encoder = Embeddings(config), Layers(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[n, 3, S, S] -> [n, H * W, C]."""
        hidden = self.embeddings(pixel_values.to(self.embeddings.patch_embedding.weight.dtype))
        for layer in self.encoder.layers:
            hidden = layer(hidden)
        return hidden


class SiglipModel(nn.Module):
    """Holds the vision model under its published name."""

    def __init__(self, config: VILAUTowerConfig) -> None:
        super().__init__()
        self.vision_model = VisionModel(config)


class Codebook(nn.Module):
    """K vectors and a row of zeros. They stay float32: rounded to bfloat16 they would give other codes."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size + 1, width), requires_grad=False)

    def nearest(self, vectors: Tensor) -> Tensor:
        """float32 [..., F] -> the codes of the nearest vectors, int64 [...]; the lower of two that are equally near.

        The distances are |r|^2 + |e|^2 - 2 r e: another form rounds otherwise and gives other codes.
        """
        flat, entries = vectors.reshape(-1, vectors.shape[-1]), self.weight[:-1].t()
        squares = flat.square().sum(1, keepdim=True) + entries.square().sum(0, keepdim=True)
        return torch.addmm(squares, flat, entries, alpha=-2.0).argmin(1).view(vectors.shape[:-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(kept, recurse)


class Quantizer(nn.Module):
    """At each depth the nearest vector of a codebook is taken from what is left of a feature."""

    def __init__(self, config: VILAUTowerConfig) -> None:
        super().__init__()
        (rows, columns, width), (code_rows, code_columns, self.depth) = config.latent_shape, config.code_shape
        self.block = rows // code_rows, columns // code_columns
        sizes = config.codebook_sizes[:1] if config.shared_codebook else config.codebook_sizes
        vector = self.block[0] * self.block[1] * width
        self.codebooks = nn.ModuleList(Codebook(size, vector) for size in sizes)

    def codebook(self, level: int) -> Codebook:
        """That of a depth."""
        codebook = self.codebooks[level if len(self.codebooks) > 1 else 0]
        assert isinstance(codebook, Codebook)
        return codebook

    def encode(self, features: Tensor) -> Tensor:
        """[n, H, W, C] -> codes int64 [n, h, w, D]."""
        left, codes = self._fold(features).float(), []
        for level in range(self.depth):
            code = self.codebook(level).nearest(left)
            left = left - F.embedding(code, self.codebook(level).weight)
            codes.append(code)
        return torch.stack(codes, dim=-1)

    def embed(self, codes: Tensor, depth: int | None = None) -> Tensor:
        """Codes int64 [n, h, w, D] -> the sums of their vectors, of the first `depth` ones: float32 [n, H, W, C].

        Raises:
            ValueError: a depth that is not 1 .. D, or a code that is not below the size of its codebook.
        """
        if depth is not None and not 1 <= depth <= self.depth:
            raise ValueError(f"depth is {depth}, and 1 to {self.depth} are there")
        for level in range(self.depth):
            size = len(self.codebook(level).weight) - 1
            if (
                codes[..., level].numel()
                and not 0 <= codes[..., level].min() <= codes[..., level].max() < size
            ):
                raise ValueError(f"codes of depth {level + 1} are not all in 0 .. {size - 1}")
        total = F.embedding(codes[..., 0], self.codebook(0).weight)
        for level in range(1, self.depth if depth is None else depth):
            total = total + F.embedding(codes[..., level], self.codebook(level).weight)
        return self._unfold(total)

    def _fold(self, features: Tensor) -> Tensor:
        """[n, H, W, C] -> [n, h, w, F]: the features of a block one behind the other, row by row."""
        rows, columns = self.block
        blocks = features.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
        return blocks.transpose(2, 3).flatten(3)

    def _unfold(self, vectors: Tensor) -> Tensor:
        """[n, h, w, F] -> [n, H, W, C]."""
        rows, columns = self.block
        blocks = vectors.unflatten(3, (rows, columns, -1)).transpose(2, 3)
        return blocks.flatten(3, 4).flatten(1, 2)


class ResidualBlock(nn.Module):
    """Two convolutions."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if channels != width:
            self.nin_shortcut = nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, ...] -> [n, width, ...]."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class PixelAttention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, ...] -> the same."""
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        hidden = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(hidden.transpose(1, 2).reshape(x.shape))


class Upsample(nn.Module):
    """Twice as many pixels along each side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, H, W] -> [n, channels, 2 H, 2 W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one size of the picture, with attention behind each where the configuration says so."""

    def __init__(self, channels: int, width: int, blocks: int, attends: bool, upsamples: bool) -> None:
        super().__init__()
        widths = [channels, *[width] * blocks]
        self.block = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(PixelAttention(width) for _ in range(blocks * attends))
        self.upsample = Upsample(width) if upsamples else None

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, channels, H, W] -> [n, width, H, W], or twice as many pixels along each side."""
        for number, block in enumerate(self.block):
            hidden = block(hidden)
            if len(self.attn):
                hidden = self.attn[number](hidden)
        return hidden if self.upsample is None else self.upsample(hidden)


class Middle(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = PixelAttention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, channels, H, W] -> the same."""
        return self.block_2(self.attn_1(self.block_1(hidden)))


class PixelDecoder(nn.Module):
    """Convolutions from the grid to the picture, level by level (VQGAN's decoder, arXiv 2012.09841)."""

    def __init__(self, ddconfig: dict[str, Any]) -> None:
        super().__init__()
        base, factors = ddconfig["ch"], ddconfig["ch_mult"]
        channels = base * factors[-1]
        self.conv_in = nn.Conv2d(ddconfig["z_channels"], channels, 3, padding=1)
        self.mid = Middle(channels)
        levels = []
        for level in reversed(range(len(factors))):
            attends = ddconfig["resolution"] // 2**level in ddconfig["attn_resolutions"]
            width = base * factors[level]
            levels.append(Level(channels, width, ddconfig["num_res_blocks"] + 1, attends, level > 0))
            channels = width
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, ddconfig["out_ch"], 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """[n, z_channels, H, W] -> [n, 3, P, P]."""
        hidden = self.mid(self.conv_in(features))
        for level in reversed(self.up):
            hidden = level(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Tower(nn.Module):
    """Encoder, quantiser and pixel decoder, under their published names."""

    def __init__(self, config: VILAUTowerConfig) -> None:
        super().__init__()
        self.siglip_model = SiglipModel(config)
        self.quantizer = Quantizer(config)
        self.post_quant_conv = nn.Conv2d(config.latent_shape[2], config.ddconfig["z_channels"], 1)
        self.decoder = PixelDecoder(config.ddconfig)
        self.decoder_grid = config.decoder_latent_shape

    def picture(self, features: Tensor) -> Tensor:
        """Features [n, H, W, C] -> pictures [n, 3, P, P]."""
        hidden = features.permute(0, 3, 1, 2).to(self.post_quant_conv.weight.dtype)
        if self.decoder_grid:
            resized = F.interpolate(hidden.float(), self.decoder_grid, mode="bilinear", align_corners=False)
            hidden = resized.to(hidden.dtype)
        return self.decoder(self.post_quant_conv(hidden))


@dataclass
class VILAUTowerOutput(ModelOutput):
    """What `VILAUTowerModel.forward` returns.

    Attributes:
        codes: int64 [n, h, w, D].
        features: float32 [n, H, W, C], the sums of the codes' vectors.
        reconstruction: [n, 3, P, P], pictures of them, about -1 .. 1.
    """

    codes: Tensor | None = None
    features: Tensor | None = None
    reconstruction: Tensor | None = None


class VILAUTowerModel(PreTrainedModel):
    """Pictures to codes (`encode`) and codes to pictures (`decode`)."""

    config_class = VILAUTowerConfig
    main_input_name = "pixel_values"
    _keep_in_fp32_modules_strict = ["codebooks"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: VILAUTowerConfig) -> None:
        super().__init__(config)
        self.rqvaesiglip = Tower(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """A tower has the weights of its folder, or torch's own."""

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Features in front of the quantiser: [n, 3, S, S] -> [n, H, W, C]."""
        hidden = self.rqvaesiglip.siglip_model.vision_model(pixel_values)
        return hidden.view(len(pixel_values), *self.config.latent_shape)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Codes of pictures.

        Args:
            pixel_values: [n, 3, S, S], of `VILAUImageProcessor`.

        Returns:
            int64 [n, h, w, D], each in 0 .. K - 1.
        """
        return self.rqvaesiglip.quantizer.encode(self.image_features(pixel_values))

    @torch.no_grad()
    def decode(self, codes: Tensor, depth: int | None = None) -> Tensor:
        """Pictures of codes; `VILAUImageProcessor.postprocess` makes images of them.

        Args:
            codes: int64 [n, h, w, D].
            depth: codes of each position that count, from the first; None: all.

        Returns:
            [n, 3, P, P], about -1 .. 1.
        """
        return self.rqvaesiglip.picture(self.rqvaesiglip.quantizer.embed(codes, depth))

    def forward(self, pixel_values: Tensor) -> VILAUTowerOutput:
        """Codes of pictures [n, 3, S, S], and the pictures that they give."""
        codes = self.encode(pixel_values)
        features = self.rqvaesiglip.quantizer.embed(codes)
        return VILAUTowerOutput(
            codes=codes, features=features, reconstruction=self.rqvaesiglip.picture(features)
        )
