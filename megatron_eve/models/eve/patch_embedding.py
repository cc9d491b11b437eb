"""The patch embedding layer of EVE (arXiv 2406.11832, section 3.1), over all images of a microbatch at once.

The published code pastes each picture on a square, embeds the square, crops it and loops over images. Here the
images are one flat list of patches, four to a merged patch, so there is no canvas, no loop over images and nothing
thrown away, and the parameters keep the published names and shapes.

Letters: P = patches, N = P / 4 = merged patches, I = images, V = visual rows (for each image 1 + rows * (columns + 1)),
C = width, H = heads, D = C / H, K = 588 = pixel values of a patch.

Both attentions have few queries and many keys: a merged patch attends to its four patches, the class embedding to all
merged patches of an image. So the query is projected instead of every key, ``(W_k y) . q = y . (W_k^T q)`` for each
head, and the weighted mean of the inputs instead of every value, ``sum p W_v y = W_v sum p y``. These are identities,
not approximations; they halve the operations of the published form.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_eve.models.image_rows import row_indices
from megatron_eve.models.normalise import normalise

# On a CPU merged patches go through the local attention so many at a time, so that what is computed of them stays in
# the cache: without it the layer takes 1.3 times as long.
_CPU_BLOCK = 512


class NormedLinear(nn.Sequential):
    """A LayerNorm and a linear map without bias, under the published names 0 and 1."""

    def __init__(self, width: int, outputs: int, epsilon: float) -> None:
        super().__init__(nn.LayerNorm(width, eps=epsilon), nn.Linear(width, outputs, bias=False))

    @property
    def norm(self) -> nn.LayerNorm:
        """The first of the two."""
        return cast(nn.LayerNorm, self[0])

    @property
    def linear(self) -> nn.Linear:
        """The second of the two."""
        return cast(nn.Linear, self[1])


class PatchAttention(nn.Module):
    """One of the layer's two attentions, with the published names of its parameters.

    The scale is that of the whole width and not of a head, as published.
    """

    def __init__(self, hidden_size: int, num_heads: int, layernorm_epsilon: float) -> None:
        super().__init__()
        self.q = NormedLinear(hidden_size, hidden_size, layernorm_epsilon)
        self.kv = NormedLinear(hidden_size, 2 * hidden_size, layernorm_epsilon)  # keys, then values
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.num_heads = num_heads
        self.scale = hidden_size**-0.5

    def forward(self, query: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from each query to the vectors of its own context.

        Args:
            query: [n, C].
            context: [n, k, C], or [1, k, C] for all queries.
            mask: bool [n, k], True where a query does not see a vector.

        Returns:
            [n, C], without the residual.
        """
        keys, values = self.kv.linear.weight.unflatten(0, (2, self.num_heads, -1))  # (H, D, C) each
        normed = self.kv.norm(context)
        queries = self.q(query).unflatten(1, (self.num_heads, -1)).transpose(0, 1)  # (H, n, D)
        projected = (queries @ keys).transpose(0, 1)  # (n, H, C)
        # In float32 at least, under bfloat16 too.
        logits = (projected @ normed.mT).to(torch.promote_types(torch.float32, normed.dtype)) * self.scale
        if mask is not None:
            logits = logits.masked_fill(mask[:, None], -torch.inf)
        mean = torch.softmax(logits, dim=-1).to(normed.dtype) @ normed  # (n, H, C)
        attended = (mean.transpose(0, 1) @ values.mT).transpose(0, 1)  # (n, H, D)
        return self.proj(attended.flatten(1))


class PatchEmbedding(nn.Module):
    """Pixels of all images of a microbatch to visual rows: CLS, then each row of merged patches with its row-end token.

    Replicated over tensor parallel ranks; a state dict has the published keys below ``model.vision_tower``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 8,
        patch_size: int = 14,
        conv_stride: int = 2,
        layernorm_epsilon: float = 1e-5,
    ) -> None:
        """
        Args:
            hidden_size: C, ``mm_hidden_size`` of the published config.
            num_heads: H, a divisor of C.
            patch_size: side of a patch in pixels.
            conv_stride: side of a merged patch in patches; the patch order of the loader asks for 2.
            layernorm_epsilon: of all four norms.

        Raises:
            ValueError: heads that do not divide the width, or merged patches of another size than 2 x 2.
        """
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"the patch embedding's width {hidden_size} is not divisible by its {num_heads} heads"
            )
        if conv_stride != 2:
            raise ValueError(f"merged patches are 2 x 2 patches; conv_stride {conv_stride} is not supported")
        self.class_embedding = nn.Parameter(torch.randn(hidden_size))
        self.split_embedding = nn.Parameter(torch.randn(hidden_size))
        self.patch_embedding = nn.Conv2d(3, hidden_size, patch_size, stride=patch_size, bias=False)
        self.local_attention = PatchAttention(hidden_size, num_heads, layernorm_epsilon)
        self.global_attention = PatchAttention(hidden_size, num_heads, layernorm_epsilon)

    def forward(self, patches: Tensor, image_grids: Tensor) -> Tensor:
        """
        Args:
            patches: [P, 588] uint8 pixels, or normalised floats. Merged patches row-major, in each its four patches
                row-major, in a patch (channel, y, x).
            image_grids: [I, 2] int64, rows and columns of merged patches of each image; best on the CPU.

        Returns:
            [V, C] visual rows, images in order, in the dtype of the parameters.

        Raises:
            ValueError: patches and grids that do not belong together.
        """
        merged = int(image_grids.prod(dim=1).sum())
        if patches.shape[0] != 4 * merged:
            raise ValueError(
                f"{patches.shape[0]} patches came with grids of {merged} merged patches of four each"
            )
        weight = self.patch_embedding.weight
        layout = row_indices(image_grids).to(weight.device)
        pixels = (
            normalise(patches, weight.dtype) if patches.dtype == torch.uint8 else patches.to(weight.dtype)
        )
        block = 4 * _CPU_BLOCK if pixels.device.type == "cpu" else max(len(pixels), 1)
        local = torch.cat([self._local_features(some) for some in pixels.split(block)])
        cls = self._global_features(local, layout.images, len(image_grids))

        split = self.split_embedding.expand(len(layout.split_rows), -1)
        rows = torch.cat([layout.cls_rows, layout.split_rows, layout.merged_rows])
        out = local.new_empty(len(rows), local.shape[1])
        return out.index_copy_(0, rows, torch.cat([cls, split, local]))

    def _local_features(self, pixels: Tensor) -> Tensor:
        """[P, K] -> [N, C]: the mean embedding of the four patches, plus its attention over them."""
        embedded = F.linear(pixels, self.patch_embedding.weight.flatten(1)).unflatten(0, (-1, 4))  # (N, 4, C)
        mean = embedded.mean(dim=1)
        return mean + self.local_attention(mean, embedded)

    def _global_features(self, local: Tensor, images: Tensor, count: int) -> Tensor:
        """[N, C] -> [I, C]: the class embedding, plus its attention over all merged patches of each image.

        One softmax over all of them, those of other images masked: a microbatch holds few images, and a dense product
        sums in a fixed order, which a scatter does not.
        """
        others = images != torch.arange(count, device=local.device)[:, None]  # (I, N)
        query = self.class_embedding.expand(count, -1)
        return query + self.global_attention(query, local[None], others)
