"""Patch embedding: all images of a microbatch at once, against one padded image at a time.

    python benchmarks/patch_embedding.py [--width 1024] [--repeats 7] [--threads 2]

Forward and backward of the layer without its projector, float32 on the CPU, for 16 photos of mixed shape at 672
pixels. The other side is :class:`PlainPatchEmbedding`: the same function written down as the paper and the public
model describe it, on square canvases with a mask, one image after another. The tests use it as their reference.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_eve.models.eve.geometry import PATCH_SIZE, image_geometry
from megatron_eve.models.eve.patch_embedding import PatchEmbedding

# Width and height in pixels of 16 photos, in about the shares of web photos and SA-1B: 3:2 and 4:3 lying and
# standing, some wide ones, some square.
PHOTOS = [
    *[(1500, 1000)] * 4,
    *[(1000, 1500)] * 2,
    *[(640, 480)] * 3,
    *[(480, 640)] * 2,
    *[(1920, 1080)] * 2,
    *[(1000, 1000)] * 3,
]
IMAGE_SIZE = 672


class PlainAttention(nn.Module):
    """One query over a set of keys, the same for CLS over cells and for a cell over its four patches."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.q = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))
        self.kv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width, bias=False))
        self.proj = nn.Linear(width, width)
        self.num_heads = num_heads
        self.scale = width**-0.5  # of the whole width, not of a head

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """queries [n, C], context [n, keys, C] -> [n, C]."""
        n, keys, width = context.shape
        q = self.q(queries).reshape(n, 1, self.num_heads, -1)
        k, v = self.kv(context).reshape(n, keys, 2, self.num_heads, -1).unbind(dim=2)
        weights = torch.softmax((q * self.scale * k).sum(dim=-1, keepdim=True), dim=1)
        return queries + self.proj((weights * v).sum(dim=1).reshape(n, width))


class PlainPatchEmbedding(nn.Module):
    """The layer as published: convolution over the padded square, then crop and attend, image by image."""

    def __init__(self, width: int, num_heads: int = 8) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.split_embedding = nn.Parameter(torch.randn(width))
        self.patch_embedding = nn.Conv2d(3, width, PATCH_SIZE, stride=PATCH_SIZE, bias=False)
        self.local_attention = PlainAttention(width, num_heads)
        self.global_attention = PlainAttention(width, num_heads)

    def embed_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image [4, S, S], three normalised colours and a mask -> (cells [rows, columns, C], CLS [1, C])."""
        features = self.patch_embedding(image[None, :3])[0]  # (C, S / 14, S / 14)
        mask = F.avg_pool2d(image[None, 3:], PATCH_SIZE)[0, 0]
        inside = torch.nonzero(mask)
        top, left = inside.min(dim=0).values
        bottom, right = inside.max(dim=0).values
        features = features[:, top : bottom + 1, left : right + 1]
        width, patch_rows, patch_columns = features.shape
        rows, columns = patch_rows // 2, patch_columns // 2

        queries = F.avg_pool2d(features[None], 2)[0].reshape(width, rows * columns).T
        cells = features.reshape(width, rows, 2, columns, 2).permute(1, 3, 2, 4, 0)
        local = self.local_attention(queries, cells.reshape(rows * columns, 4, width))
        cls = self.global_attention(self.class_embedding[None], local[None])
        return local.reshape(rows, columns, width), cls

    def forward(self, images: Tensor) -> Tensor:
        """images [I, 4, S, S] -> visual rows [V, C], images in order."""
        rows = []
        for image in images:
            cells, cls = self.embed_image(image)
            split = self.split_embedding.expand(cells.shape[0], 1, -1)
            rows += [cls, torch.cat([cells, split], dim=1).flatten(0, 1)]
        return torch.cat(rows)


def canvas_from_patches(patches: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """Pastes an image's patches in the middle of a zero square, with the mask as fourth channel.

    Args:
        patches: [4 * rows * columns, 588] normalised, in the order of the loader: cells row-major, four patches a
            cell (row-major), a patch as (channel, y, x).
        rows, columns: grid of cells.
        side: side of the square in pixels.

    Returns:
        [4, side, side], of the dtype of the patches.
    """
    picture = patches.reshape(rows, columns, 2, 2, 3, PATCH_SIZE, PATCH_SIZE)
    picture = picture.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, 28 * rows, 28 * columns)
    canvas = patches.new_zeros(4, side, side)
    top = (side // PATCH_SIZE - 2 * rows) // 2 * PATCH_SIZE
    left = (side // PATCH_SIZE - 2 * columns) // 2 * PATCH_SIZE
    canvas[:3, top : top + 28 * rows, left : left + 28 * columns] = picture
    canvas[3, top : top + 28 * rows, left : left + 28 * columns] = 1
    return canvas


def median_seconds(runs: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    """Median wall time of each run after two calls to warm up, taken in turns so that all see the same machine."""
    times: list[list[float]] = [[] for _ in runs]
    for number in range(repeats + 2):
        for run, measured in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if number >= 2:
                measured.append(time.perf_counter() - start)
    return [statistics.median(measured) for measured in times]


def forward_backward(layer: nn.Module, *inputs: Tensor) -> None:
    """One pass there and back, as a training step makes it."""
    layer.zero_grad()
    rows = layer(*inputs)
    rows.backward(torch.ones_like(rows))


def main() -> None:
    """Times both ways on the same images and weights, checks that they agree, prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1024, help="width of the patch embedding")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes; the median is reported")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    geometries = [image_geometry(width, height, IMAGE_SIZE) for width, height in PHOTOS]
    grids = torch.tensor([(geometry.rows, geometry.columns) for geometry in geometries])
    patches = torch.randn(sum(geometry.patches for geometry in geometries), 3 * PATCH_SIZE**2)
    canvases = torch.stack(
        [
            canvas_from_patches(part, geometry.rows, geometry.columns, IMAGE_SIZE)
            for part, geometry in zip(patches.split([g.patches for g in geometries]), geometries, strict=True)
        ]
    )
    plain = PlainPatchEmbedding(arguments.width)
    ours = PatchEmbedding(arguments.width)
    ours.load_state_dict(plain.state_dict())
    with torch.no_grad():
        expected = plain(canvases)
        difference = float((ours(patches, grids) - expected).norm() / expected.norm())

    plain_seconds, our_seconds = median_seconds(
        [lambda: forward_backward(plain, canvases), lambda: forward_backward(ours, patches, grids)],
        arguments.repeats,
    )
    print(
        f"{len(PHOTOS)} photos at {IMAGE_SIZE} px, {len(patches) // 4:,} cells, {len(expected):,} visual rows"
    )
    print(f"width {arguments.width}, float32, {arguments.threads} threads, median of {arguments.repeats}")
    print(f"relative L2 distance of the two outputs: {difference:.1e}")
    print(f"{'forward + backward':32} {'seconds':>8} {'images/s':>9}")
    print(f"{'padded, one image at a time':32} {plain_seconds:8.3f} {len(PHOTOS) / plain_seconds:9.2f}")
    print(f"{'flat patches, all images':32} {our_seconds:8.3f} {len(PHOTOS) / our_seconds:9.2f}")
    print(f"ratio {plain_seconds / our_seconds:.2f}")


if __name__ == "__main__":
    main()
