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
from torch.distributed import ProcessGroup

from megatron_eve.models.towers.global_batch import start_and_total, sum_over_ranks
from megatron_eve.models.vila_u.restart import RestartDraw

# Of the public code's running sums.
DECAY, EPSILON = 0.99, 1e-5


# Gets depth, vectors [n, h, w, F] and codes [n, h, w].
_Update = Callable[[int, torch.Tensor, torch.Tensor], None]


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


class UpdateStep(NamedTuple):
    """What an update of a codebook must know of its step.

    Attributes:
        level: depth, from 0.
        start, total: number of this rank's first vector in the global batch, and of all vectors there.
        draw: which vectors take the place of unused codes; None: those codes stay as they are.
        group: ranks that the batch is divided among; None: this process alone.
        decay: of the running sums.
        epsilon: that smooths the counts.
    """

    level: int
    start: int
    total: int
    draw: RestartDraw | None
    group: ProcessGroup | None
    decay: float
    epsilon: float


class Codebook(nn.Module):
    """K vectors and a row of zeros behind them, with the running sums that tower training updates them from.

    All are float32 buffers under the published names (`double()` makes them float64).
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

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Random vectors to train from, standard normal as torch's Embedding; sums as if nothing was seen of them.

        Of released weights nobody knows the start [inferred]: since no code was seen, the first step with restarts
        replaces nearly all of them by vectors of its batch.
        """
        self.weight[:-1].normal_(generator=generator)
        self.weight[-1].zero_()
        self.cluster_size_ema.zero_()
        self.embed_ema.copy_(self.weight[:-1])

    @torch.no_grad()
    def update(self, vectors: torch.Tensor, codes: torch.Tensor, step: UpdateStep) -> torch.Tensor:
        """Move running sums and vectors towards what a step of training saw, in the public code's order.

        N <- decay N + (1 - decay) n and m <- decay m + (1 - decay) sum, in which n and sum count and add up the vectors
        of each code in the global batch; where N < 1, m is replaced by a vector of the batch and N by 1; then the
        codebook's vectors are m / N, with N smoothed.

        Args:
            vectors: [V, F] of this rank.
            codes: int64 [V], theirs.
            step: the rest.

        Returns:
            int64 [K]: n.
        """
        size, width = self.embed_ema.shape
        seen = vectors.new_zeros(size, width + 1)
        # Unlike index_add_, sums in the same order each time on a GPU, too.
        ones = vectors.new_ones(len(vectors), 1)
        seen.index_put_((codes,), torch.cat([vectors, ones], dim=1), accumulate=True)
        seen = sum_over_ranks(seen, step.group)
        counts = seen[:, width]
        self.cluster_size_ema.mul_(step.decay).add_(counts, alpha=1 - step.decay)
        self.embed_ema.mul_(step.decay).add_(seen[:, :width], alpha=1 - step.decay)
        if step.draw is not None:
            unused = (self.cluster_size_ema < 1).nonzero()[:, 0]
            if len(unused):
                self.embed_ema[unused] = _restart_vectors(vectors, unused, size, step, step.draw)
                self.cluster_size_ema[unused] = 1
        total = self.cluster_size_ema.sum()
        smoothed = total * (self.cluster_size_ema + step.epsilon) / (total + size * step.epsilon)
        self.weight[:-1] = self.embed_ema / smoothed[:, None]
        return counts.long()

    @torch.no_grad()
    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """The code of the nearest vector, the lower one where two are equally near.

        Distances are |r|^2 + |e|^2 - 2 r e in the codebook's float32, as in the public code: another form rounds
        otherwise and gives other codes.

        Args:
            vectors: [..., F] of the codebook's dtype.

        Returns:
            int64 [...].
        """
        flat, vectors_of_codes = vectors.reshape(-1, vectors.shape[-1]), self.weight[:-1].t()
        squares = flat.square().sum(1, keepdim=True) + vectors_of_codes.square().sum(0, keepdim=True)
        distances = torch.addmm(squares, flat, vectors_of_codes, alpha=-2.0)
        return distances.argmin(1).view(vectors.shape[:-1])


def _restart_vectors(
    vectors: torch.Tensor, unused: torch.Tensor, size: int, step: UpdateStep, draw: RestartDraw
) -> torch.Tensor:
    """Vectors of the global batch for the codes `unused`: [U, F], the same on all ranks.

    Only these travel between the ranks. A batch with fewer vectors than codes is repeated, with noise, as in the public
    code.
    """
    width = vectors.shape[1]
    repeats = 1 if step.total >= size else -(-size // step.total)
    chosen = draw.draw(step.level, repeats * step.total).to(unused.device)[unused]
    place = chosen % step.total - step.start
    own = (place >= 0) & (place < len(vectors))
    found = vectors.new_zeros(len(unused), width)
    found[own] = vectors[place[own]]
    found = sum_over_ranks(found, step.group)
    if step.total < size:
        noise = draw.noise(step.level, (repeats * step.total, width)).to(found)
        found = found + noise[chosen] * (0.01 / width**0.5)
    return found


class Quantizer(nn.Module):
    """Residual quantisation with one codebook for all depths, or one for each.

    Attributes:
        codebooks: D of them, under the published names; all are one where the codebook is shared.
        last_usage: int64 [D, largest K]: how often the last `train_forward` took each code, in the global batch.
    """

    last_usage: torch.Tensor | None = None

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
        """Quantise features [n, H, W, C]; the codes are searched in the codebooks' float32 whatever their dtype."""
        return self._quantize(features, None)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Random codebooks to train from: see `Codebook.reset`."""
        for codebook in dict.fromkeys(self.codebooks):
            codebook.reset(generator)  # type: ignore[operator]

    def train_forward(
        self,
        features: torch.Tensor,
        draw: RestartDraw | None,
        group: ProcessGroup | None = None,
        *,
        decay: float = DECAY,
        epsilon: float = EPSILON,
    ) -> Quantized:
        """Quantise as `forward` does, and update the codebooks depth by depth: see `Codebook.update`.

        A depth searches and reads the vectors that it updates afterwards; the next depth of a shared codebook searches
        the updated ones, and the sums decay D times a step. Every rank of the group calls it.

        Args:
            features: [n, H, W, C] of this rank, whose pictures follow those of the ranks before it in the global
                batch; n may differ from rank to rank.
            draw: of the restart of unused codes from the global batch; None: without restarts. (The public code draws
                from the first rank's batch.)
            group: ranks that the batch is divided among; None: this process alone.
            decay: of the running sums.
            epsilon: that smooths the counts.

        Returns:
            Of this rank's pictures; the loss is their mean.
        """
        vectors = (
            features.shape[0] * (features.shape[1] // self.block[0]) * (features.shape[2] // self.block[1])
        )
        start, total = start_and_total(vectors, group)
        largest = max(len(codebook.embed_ema) for codebook in self.codebooks)  # type: ignore[arg-type]
        usage = torch.zeros(self.depth, largest, dtype=torch.int64, device=features.device)

        def update(level: int, left: torch.Tensor, codes: torch.Tensor) -> None:
            step = UpdateStep(level, start, total, draw, group, decay, epsilon)
            codebook = self.codebooks[level]
            counts = codebook.update(left.flatten(0, -2), codes.flatten(), step)  # type: ignore[operator]
            usage[level, : len(counts)] = counts

        quantized = self._quantize(features, update)
        self.last_usage = usage
        return quantized

    def _quantize(self, features: torch.Tensor, update: _Update | None) -> Quantized:
        vectors = self._fold_exact(features)
        codes, sums = self._search(vectors.detach(), update)
        losses = torch.stack([(vectors - total).square().mean() for total in sums])
        quantized = vectors + (sums[-1] - vectors).detach()
        return Quantized(codes, self.unfold(quantized).to(features.dtype), losses.mean())

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Codes int64 [n, h, w, D] of features [n, H, W, C]."""
        return self._search(self._fold_exact(features))[0]

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

    def _fold_exact(self, features: torch.Tensor) -> torch.Tensor:
        """As `fold`, in the codebooks' dtype."""
        return self.fold(features).to(self.codebooks[0].weight.dtype)  # type: ignore[arg-type]

    @torch.no_grad()
    def _search(
        self, vectors: torch.Tensor, update: _Update | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Codes [n, h, w, D], and the sums [n, h, w, F] of the first 1 .. D vectors.

        `update` gets depth, vectors and codes when the depth's codebook has been read.
        """
        left = vectors
        codes: list[torch.Tensor] = []
        sums: list[torch.Tensor] = []
        for level in range(self.depth):
            code = self.codebooks[level].nearest(left)  # type: ignore[operator]
            found = self._lookup(level, code)
            if update is not None:
                update(level, left, code)
            left = left - found
            sums.append(found if not sums else sums[-1] + found)
            codes.append(code)
        return torch.stack(codes, dim=-1), sums

    def _lookup(self, level: int, codes: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(codes, self.codebooks[level].weight)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Quantizer:
        """Move to another device, and never round: a codebook that is rounded to bfloat16 gives other codes."""

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= tensor.dtype.itemsize else tensor.to(moved.device)

        return super()._apply(kept, recurse)  # type: ignore[return-value]
