"""The residual quantiser: features become codes of several depths, and codes become sums of codebook vectors.

Follows the public code (mit-han-lab/vila-u, after RQ-VAE, arXiv 2203.01941): at each depth the nearest vector of a
codebook is taken from what is left of the feature. Plain torch.

Shapes: n = pictures, H x W x C = features of one, h x w = positions with codes, F = width of a codebook vector,
D = depth, K = size of a codebook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


class Quantized(NamedTuple):
    """What a quantiser makes of features.

    Attributes:
        codes: int64 [n, h, w, D].
        features: [n, H, W, C] of the input's dtype: x + (q - x), in which q is the sum of the codebook vectors and the
            gradient is that of x. In floating point it is not exactly q.
        commitment_loss: float32; how far the features are from the sums of the first 1 .. D vectors, as mean squares.
    """

    codes: torch.Tensor
    features: torch.Tensor
    commitment_loss: torch.Tensor


class Codebook(nn.Module):
    """K vectors and a row of zeros behind them, with the running sums that tower training updates them from.

    All are float32 buffers under the published names.
    """

    weight: torch.Tensor
    cluster_size_ema: torch.Tensor
    embed_ema: torch.Tensor

    def __init__(self, size: int, width: int) -> None:
        """Zeros: the vectors come from a checkpoint."""
        super().__init__()
        self.register_buffer("weight", torch.zeros(size + 1, width))
        self.register_buffer("cluster_size_ema", torch.zeros(size))
        self.register_buffer("embed_ema", torch.zeros(size, width))

    @torch.no_grad()
    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """The code of the nearest vector, the lower one where two are equally near.

        Distances are |r|^2 + |e|^2 - 2 r e in float32, as in the public code: another form rounds otherwise and gives
        other codes.

        Args:
            vectors: float32 [..., F].

        Returns:
            int64 [...].
        """
        flat, vectors_of_codes = vectors.reshape(-1, vectors.shape[-1]), self.weight[:-1].t()
        squares = flat.square().sum(1, keepdim=True) + vectors_of_codes.square().sum(0, keepdim=True)
        distances = torch.addmm(squares, flat, vectors_of_codes, alpha=-2.0)
        return distances.argmin(1).view(vectors.shape[:-1])


class Quantizer(nn.Module):
    """Residual quantisation with one codebook for all depths, or one for each.

    Attributes:
        codebooks: D of them, under the published names; all are one where the codebook is shared.
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        code_shape: tuple[int, int, int],
        codebook_sizes: tuple[int, ...],
        shared: bool,
    ) -> None:
        """Build it with codebooks of zeros.

        Args:
            latent_shape: (H, W, C).
            code_shape: (h, w, D); h must divide H, and w W. A block of features becomes one vector.
            codebook_sizes: K of each depth.
            shared: one codebook for all depths.

        Raises:
            ValueError: sizes that do not fit each other.
        """
        super().__init__()
        (height, width, channels), (rows, columns, depth) = latent_shape, code_shape
        if height % rows or width % columns:
            raise ValueError(f"{rows} x {columns} codes do not divide a grid of {height} x {width} features")
        if len(codebook_sizes) != depth or (shared and len(set(codebook_sizes)) > 1):
            raise ValueError(f"codebooks of the sizes {codebook_sizes} for {depth} depths")
        self.block = height // rows, width // columns
        vector = self.block[0] * self.block[1] * channels
        if shared:
            self.codebooks = nn.ModuleList([Codebook(codebook_sizes[0], vector)] * depth)
        else:
            self.codebooks = nn.ModuleList(Codebook(size, vector) for size in codebook_sizes)

    @property
    def depth(self) -> int:
        """D."""
        return len(self.codebooks)

    def forward(self, features: torch.Tensor) -> Quantized:
        """Quantise features [n, H, W, C]; the codes are searched in float32 whatever their dtype."""
        vectors = self.fold(features).float()
        codes, sums = self._search(vectors.detach())
        losses = torch.stack([(vectors - total).square().mean() for total in sums])
        quantized = vectors + (sums[-1] - vectors).detach()
        return Quantized(codes, self.unfold(quantized).to(features.dtype), losses.mean())

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Codes int64 [n, h, w, D] of features [n, H, W, C]."""
        return self._search(self.fold(features).float())[0]

    def embed(self, codes: torch.Tensor, depth: int | None = None) -> torch.Tensor:
        """Sums of the codebook vectors of codes.

        Args:
            codes: int64 [n, h, w, D], 0 .. K - 1.
            depth: codes of each position that count, from the first, 1 .. D; None: all.

        Returns:
            float32 [n, H, W, C].
        """
        assert depth is None or 1 <= depth <= self.depth
        total = self._lookup(0, codes[..., 0])
        for level in range(1, self.depth if depth is None else depth):
            total = total + self._lookup(level, codes[..., level])
        return self.unfold(total)

    def vectors(self, codes: torch.Tensor) -> torch.Tensor:
        """The codebook vectors of codes int64 [n, h, w, D]: float32 [n, h, w, D, F]."""
        return torch.stack([self._lookup(level, codes[..., level]) for level in range(self.depth)], dim=-2)

    def fold(self, features: torch.Tensor) -> torch.Tensor:
        """[n, H, W, C] -> [n, h, w, F]: a block's features one behind the other, row by row."""
        (rows, columns), (n, height, width, channels) = self.block, features.shape
        blocks = features.reshape(n, height // rows, rows, width // columns, columns, channels)
        return blocks.permute(0, 1, 3, 2, 4, 5).reshape(n, height // rows, width // columns, -1)

    def unfold(self, vectors: torch.Tensor) -> torch.Tensor:
        """[n, h, w, F] -> [n, H, W, C]."""
        (rows, columns), (n, height, width, _) = self.block, vectors.shape
        blocks = vectors.reshape(n, height, width, rows, columns, -1).permute(0, 1, 3, 2, 4, 5)
        return blocks.reshape(n, height * rows, width * columns, -1)

    @torch.no_grad()
    def _search(self, vectors: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Codes [n, h, w, D], and the sums [n, h, w, F] of the first 1 .. D vectors."""
        left = vectors
        codes: list[torch.Tensor] = []
        sums: list[torch.Tensor] = []
        for level in range(self.depth):
            code = self.codebooks[level].nearest(left)  # type: ignore[operator]
            found = self._lookup(level, code)
            left = left - found
            sums.append(found if not sums else sums[-1] + found)
            codes.append(code)
        return torch.stack(codes, dim=-1), sums

    def _lookup(self, level: int, codes: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(codes, self.codebooks[level].weight)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Quantizer:
        """Move to another device, and stay float32: a codebook that is rounded to bfloat16 gives other codes."""

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(kept, recurse)  # type: ignore[return-value]
