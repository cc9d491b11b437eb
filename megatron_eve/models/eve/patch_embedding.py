"""The patch embedding layer of EVE (arXiv 2406.11832, section 3.1), over all images of a microbatch at once.

The published code pastes each picture on a square, embeds the square, crops it and loops over images. Here the
images are one flat list of patches, four to a cell, so there is no canvas, no loop and nothing thrown away, and
the parameters keep the published names and shapes.

Letters: P = patches, N = P / 4 = cells, I = images, V = visual rows (for each image 1 + rows * (columns + 1)),
C = width, H = heads, D = C / H, K = 588 = pixel values of a patch.

Both attentions ask few queries of many keys (a cell asks its four patches, an image all its cells), so the query
is projected into the space of the keys, ``(W_k y) . q = y . (W_k^T q)`` for each head, and the weighted mean of the
inputs is projected in place of every value, ``sum p W_v y = W_v sum p y``. In the local attention the inputs y are
layer-normed patch embeddings ``x = W p``, and the norm is linear in p but for one number a patch::

    LayerNorm(x) = gain * (W - mean_C(W)) p / std(x) + bias

so that the maps compose and the pixels themselves serve as keys and values: K of them for C = 1024 features (toy
widths below K would do better without, and do not matter). The bias of the norm adds the same to all four logits
and drops out of the softmax; for the values it is a constant. These are identities, not approximations; together
they leave under a third of the operations of the published form.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_eve.models.eve.normalise import normalise
from megatron_eve.runtime.transfer import to_device

# On a CPU the cells go through the local attention in blocks that stay in the cache; without this, allocating
# tensors of [N, H, K] costs more than computing them.
_CPU_BLOCK = 512


class RowLayout(NamedTuple):
    """Where the rows of a microbatch's images lie among its V visual rows. All int64."""

    cell_images: Tensor
    """[N] the image of each cell."""
    cls_rows: Tensor
    """[I] row of each CLS."""
    split_rows: Tensor
    """[sum of grid rows] row of each row-end token."""
    cell_rows: Tensor
    """[N] row of each cell."""


def row_layout(image_grids: Tensor) -> RowLayout:
    """Builds the layout of the visual rows from the grid sizes alone, on the device that holds them.

    Args:
        image_grids: [I, 2] int64, rows and columns of cells. Sizes of the result depend on the values, so a grid
            on an accelerator costs a synchronisation.
    """
    rows, columns = image_grids.unbind(dim=1)
    images = torch.arange(len(image_grids), device=image_grids.device)
    lengths = 1 + rows * (columns + 1)
    starts = lengths.cumsum(0) - lengths

    cells = rows * columns
    cell_images = images.repeat_interleave(cells)
    cell = torch.arange(len(cell_images), device=image_grids.device) - (cells.cumsum(0) - cells)[cell_images]
    row_images = images.repeat_interleave(rows)
    row = torch.arange(len(row_images), device=image_grids.device) - (rows.cumsum(0) - rows)[row_images]
    return RowLayout(
        cell_images=cell_images,
        cls_rows=starts,
        split_rows=starts[row_images] + (row + 1) * (columns[row_images] + 1),
        # Before a cell lie CLS, the image's earlier cells, and a row end for each full row of them.
        cell_rows=starts[cell_images] + 1 + cell + cell // columns[cell_images],
    )


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
    """Parameters of one of the layer's two attentions, under their published names."""

    def __init__(self, hidden_size: int, num_heads: int, layernorm_epsilon: float) -> None:
        super().__init__()
        self.q = NormedLinear(hidden_size, hidden_size, layernorm_epsilon)
        self.kv = NormedLinear(hidden_size, 2 * hidden_size, layernorm_epsilon)  # keys, then values
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.num_heads = num_heads
        self.scale = hidden_size**-0.5  # of the whole width, not of a head: as published


class PatchEmbedding(nn.Module):
    """Pixels of all images of a microbatch to visual rows: CLS, then each row of cells with its row-end token.

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
            conv_stride: side of a cell in patches; the patch order of the loader asks for 2.
            layernorm_epsilon: of all four norms.

        Raises:
            ValueError: heads that do not divide the width, or another cell than 2 x 2.
        """
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"the patch embedding's width {hidden_size} is not divisible by its {num_heads} heads"
            )
        if conv_stride != 2:
            raise ValueError(f"cells are 2 x 2 patches; conv_stride {conv_stride} is not supported")
        self.class_embedding = nn.Parameter(torch.randn(hidden_size))
        self.split_embedding = nn.Parameter(torch.randn(hidden_size))
        self.patch_embedding = nn.Conv2d(3, hidden_size, patch_size, stride=patch_size, bias=False)
        self.local_attention = PatchAttention(hidden_size, num_heads, layernorm_epsilon)
        self.global_attention = PatchAttention(hidden_size, num_heads, layernorm_epsilon)

    def forward(self, patches: Tensor, image_grids: Tensor) -> Tensor:
        """
        Args:
            patches: [P, 588] uint8 pixels, or normalised floats. Cells row-major, in a cell its four patches
                row-major, in a patch (channel, y, x).
            image_grids: [I, 2] int64, rows and columns of cells of each image; best on the CPU.

        Returns:
            [V, C] visual rows, images in order, in the dtype of the parameters.

        Raises:
            ValueError: patches and grids that do not belong together.
        """
        cells = int(image_grids.prod(dim=1).sum())
        if patches.shape[0] != 4 * cells:
            raise ValueError(f"{patches.shape[0]} patches came with grids of {cells} cells of four patches")
        weight = self.patch_embedding.weight
        layout = RowLayout(*(to_device(index, weight.device) for index in row_layout(image_grids)))
        pixels = (
            normalise(patches, weight.dtype) if patches.dtype == torch.uint8 else patches.to(weight.dtype)
        )
        local = self._local_features(pixels)
        cls = self._global_features(local, layout.cell_images, len(image_grids))

        split = self.split_embedding.expand(len(layout.split_rows), -1)
        rows = torch.cat([layout.cls_rows, layout.split_rows, layout.cell_rows])
        out = local.new_empty(len(rows), local.shape[1])
        return out.index_copy_(0, rows, torch.cat([cls, split, local]))

    def _local_features(self, pixels: Tensor) -> Tensor:
        """[P, K] -> [N, C]: each cell's mean patch embedding, plus attention over its four patches.

        K may be more than the weight has, filled up with zeros; the weight is then, too, and nothing changes.
        """
        attention, dtype = self.local_attention, pixels.dtype
        weight = self.patch_embedding.weight.flatten(1)  # (C, K)
        weight = F.pad(weight, (0, pixels.shape[1] - weight.shape[1]))
        cell_pixels = pixels.view(-1, 4, pixels.shape[1]).mean(dim=1)  # (N, K)
        mean, mean_variance, variance = _EmbedCells.apply(pixels, cell_pixels, weight)

        # The composed maps are small; in float32, so that bfloat16 parameters are rounded once and not twice.
        wide = weight.to(_at_least_float32(dtype))
        centred = wide - wide.mean(dim=0)
        query_map, key_map, value_map = (
            ((part * norm.weight).to(wide.dtype) @ centred).to(dtype)  # (C, K)
            for norm, part in (
                (attention.q.norm, attention.q.linear.weight),
                *((attention.kv.norm, part) for part in attention.kv.linear.weight.chunk(2)),
            )
        )
        rstd = torch.rsqrt(mean_variance + attention.q.norm.eps).to(dtype)
        query_bias = attention.q.linear.weight @ attention.q.norm.bias
        queries = torch.addcmul(query_bias, F.linear(cell_pixels, query_map), rstd)

        context = _AttendCells.apply(
            queries.unflatten(1, (attention.num_heads, -1)),
            pixels,
            torch.rsqrt(variance + attention.kv.norm.eps),
            key_map.unflatten(0, (attention.num_heads, -1)),
            value_map.unflatten(0, (attention.num_heads, -1)),
            attention.scale,
        )
        value_bias = attention.kv.linear.weight.chunk(2)[1] @ attention.kv.norm.bias
        bias = torch.addmv(attention.proj.bias, attention.proj.weight, value_bias)
        return mean + F.linear(context.flatten(1), attention.proj.weight, bias)

    def _global_features(self, local: Tensor, cell_images: Tensor, images: int) -> Tensor:
        """[N, C] -> [I, C]: the class embedding, plus its attention over all cells of each image."""
        attention = self.global_attention
        key_map, value_map = attention.kv.linear.weight.unflatten(
            0, (2, attention.num_heads, -1)
        )  # (H, D, C)
        normed = attention.kv.norm(local)
        query = attention.q(self.class_embedding).unflatten(0, (attention.num_heads, 1, -1))  # (H, 1, D)
        projected = (query @ key_map).squeeze(1)  # (H, C)
        logits = (projected @ normed.T).to(_at_least_float32(local.dtype)) * attention.scale  # (H, N)
        # Softmax over each image's cells, as one softmax over all cells with weight zero for other images' cells:
        # a microbatch holds few images, and a dense product sums in a fixed order, which a scatter does not.
        others = cell_images != torch.arange(images, device=local.device)[:, None]  # (I, N)
        weights = torch.softmax(logits.masked_fill(others[:, None], -torch.inf), dim=-1)  # (I, H, N)
        means = (weights.to(local.dtype).flatten(0, 1) @ normed).view(images, *projected.shape)  # (I, H, C)
        context = means.transpose(0, 1) @ value_map.transpose(1, 2)  # (H, I, D)
        return self.class_embedding + attention.proj(context.transpose(0, 1).flatten(1))


def _blocks(cells: int, device: torch.device) -> list[slice]:
    """Cuts the cells into blocks that are worked on one after another: many on a CPU, else one."""
    size = _CPU_BLOCK if device.type == "cpu" else max(cells, 1)
    return [slice(first, min(first + size, cells)) for first in range(0, cells, size)]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.float32, dtype)


def _mean_square(x: Tensor) -> Tensor:
    """[..., C] -> [...], at least in float32."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=_at_least_float32(x.dtype)).square() / x.shape[-1]


class _EmbedCells(torch.autograd.Function):
    """Patch embeddings ``x = W p``, of which only each cell's mean and the variances over C are kept.

    The backward pass of the variances needs no patch embedding either: with ``A = sum_j dvar_j p_j p_j^T``,
    ``d/dW = 2 / C * (W - mean_C(W)) A``.
    """

    @staticmethod
    def forward(
        ctx: Any, pixels: Tensor, cell_pixels: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels [P, K], their mean in each cell [N, K], weight [C, K].

        Returns the mean embedding of each cell [N, C], its variance [N, 1], and that of each patch [N, 4].
        """
        cells = pixels.view(-1, 4, pixels.shape[1])
        average = weight.mean(dim=0)  # (K,), which gives each embedding's mean over C
        centred, level = weight - average, (cell_pixels @ average)[:, None]
        mean = pixels.new_empty(len(cells), weight.shape[0])
        mean_variance = pixels.new_empty(len(cells), 1, dtype=_at_least_float32(pixels.dtype))
        variance = mean_variance.new_empty(len(cells), 4)
        for block in _blocks(len(cells), pixels.device):
            embedded = cells[block] @ centred.T  # (n, 4, C)
            variance[block] = _mean_square(embedded)
            torch.mean(embedded, dim=1, out=mean[block])
            mean_variance[block, 0] = _mean_square(mean[block])
            mean[block] += level[block]
        ctx.save_for_backward(pixels, cell_pixels, centred, mean, level)
        return mean, mean_variance, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the weight; pixels have none."""
        pixels, cell_pixels, centred, mean, level = ctx.saved_tensors
        d_mean, d_mean_variance, d_variance = grads
        cells = pixels.view(-1, 4, pixels.shape[1])
        factor = 2 / centred.shape[0]
        products = centred.new_zeros(pixels.shape[1], pixels.shape[1])  # (K, K)
        d_weight = torch.zeros_like(centred)
        for block in _blocks(len(cells), pixels.device):
            weighted = cells[block] * d_variance[block, :, None].to(pixels.dtype)
            products.addmm_(weighted.flatten(0, 1).T, cells[block].flatten(0, 1))
            slope = d_mean_variance[block].to(mean.dtype)
            d_embedded = torch.addcmul(d_mean[block], mean[block] - level[block], slope, value=factor)
            d_weight.addmm_(d_embedded.T, cell_pixels[block])
        d_weight.addmm_(centred, products, alpha=factor)
        return None, None, d_weight


class _AttendCells(torch.autograd.Function):
    """For each cell and head, attention of one query over the pixels of four patches.

    ``logit_j = scale * rstd_j * p_j . (keys^T q)``, ``out = values sum_j softmax(logit)_j rstd_j p_j``.
    Nothing of size [N, H, K] outlives its block, forward or backward.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, pixels: Tensor, rstd: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """Queries [N, H, D], pixels [P, K], rstd [N, 4] at least float32, keys and values [H, D, K] -> [N, H, D]."""
        cells = pixels.view(-1, 4, pixels.shape[1])
        out = torch.empty_like(queries)
        scores = rstd.new_empty(*queries.shape[:2], 4)
        weights = torch.empty_like(scores)
        for block in _blocks(len(cells), pixels.device):
            p, r = cells[block], rstd[block, None]
            scores[block] = _map_heads(queries[block], keys) @ p.transpose(1, 2)
            weights[block] = torch.softmax(scores[block] * r * scale, dim=-1)
            mean = (weights[block] * r).to(p.dtype) @ p  # (n, H, K)
            _map_heads(mean, values.transpose(1, 2), out=out[block])
        ctx.save_for_backward(queries, pixels, rstd, keys, values, scores, weights)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, rstd, keys and values; pixels have none."""
        queries, pixels, rstd, keys, values, scores, weights = ctx.saved_tensors
        (d_out,) = grads
        cells = pixels.view(-1, 4, pixels.shape[1])
        d_queries, d_rstd = torch.empty_like(queries), torch.empty_like(rstd)
        d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
        for block in _blocks(len(cells), pixels.device):
            p, r, softmax = cells[block], rstd[block, None], weights[block]
            mean = (softmax * r).to(p.dtype) @ p  # (n, H, K)
            _add_products(d_values, d_out[block], mean)
            d_mean = _map_heads(d_out[block], values)  # (n, H, K)
            d_weighted = (d_mean @ p.transpose(1, 2)).to(rstd.dtype)  # (n, H, 4)
            d_softmax = d_weighted * r
            d_logits = softmax * (d_softmax - (softmax * d_softmax).sum(dim=-1, keepdim=True)) * ctx.scale
            d_rstd[block] = (d_weighted * softmax + d_logits * scores[block]).sum(dim=1)
            d_projected = (d_logits * r).to(p.dtype) @ p  # (n, H, K)
            _add_products(d_keys, queries[block], d_projected)
            _map_heads(d_projected, keys.transpose(1, 2), out=d_queries[block])
        return d_queries, None, d_rstd, d_keys, d_values, None


# A product for each head, on slices: a batched product of these shapes takes twice as long on a CPU.


def _map_heads(x: Tensor, maps: Tensor, out: Tensor | None = None) -> Tensor:
    """[n, H, a] times [H, a, b] for each head -> [n, H, b]."""
    if out is None:
        out = x.new_empty(*x.shape[:2], maps.shape[2])
    for head in range(x.shape[1]):
        torch.mm(x[:, head], maps[head], out=out[:, head])
    return out


def _add_products(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Adds to total [H, a, b], for each head, the product of x [n, H, a], transposed, and y [n, H, b]."""
    for head in range(x.shape[1]):
        total[head].addmm_(x[:, head].T, y[:, head])
