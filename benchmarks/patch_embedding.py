"""Patch embedding: the model's, all images of a microbatch at once, and that of exported folders, image by image.

    python benchmarks/patch_embedding.py --width 1024 --repeats 7 \\
        --threads 2

Forward and backward of the layer without its projector, float32 on the CPU, for 16 photos of mixed shape at 672
pixels. It is compared with `EVEVisionTower` of exported folders: the same function as in the paper, with a key and a
value for every patch, one image after another. The tests use that class as their reference.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from megatron_eve.models.eve.geometry import PATCH_SIZE, image_geometry
from megatron_eve.models.eve.hf.modeling_eve import EVEVisionTower
from megatron_eve.models.eve.patch_embedding import PatchEmbedding
from megatron_eve.runtime.command_line import command_parser_of

# Width and height in pixels of 16 photos, in about the proportions of web photos and SA-1B: 3:2 and 4:3, landscape
# and portrait, some wide, some square.
PHOTOS = [
    *[(1500, 1000)] * 4,
    *[(1000, 1500)] * 2,
    *[(640, 480)] * 3,
    *[(480, 640)] * 2,
    *[(1920, 1080)] * 2,
    *[(1000, 1000)] * 3,
]
IMAGE_SIZE = 672


def median_seconds(runs: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    """Median wall time of each function, after two warm-up calls; calls take turns, so load affects all alike."""
    times: list[list[float]] = [[] for _ in runs]
    for number in range(repeats + 2):
        for run, measured in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if number >= 2:
                measured.append(time.perf_counter() - start)
    return [statistics.median(measured) for measured in times]


def forward_backward(layer: nn.Module, *inputs: Any) -> None:
    """One forward and backward pass, as in a training step."""
    layer.zero_grad()
    rows = layer(*inputs)
    rows.backward(torch.ones_like(rows))


def main() -> None:
    """Time both on the same images and weights, compare their outputs, and print the table."""
    parser = command_parser_of(__doc__)
    parser.add_argument("--width", type=int, default=1024, help="width of the patch embedding")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes; the median is reported")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    geometries = [image_geometry(width, height, IMAGE_SIZE) for width, height in PHOTOS]
    grids = torch.tensor([(geometry.rows, geometry.columns) for geometry in geometries])
    patches = torch.randn(sum(geometry.patches for geometry in geometries), 3 * PATCH_SIZE**2)
    sizes = [(geometry.rows, geometry.columns) for geometry in geometries]
    exported = EVEVisionTower(arguments.width)
    ours = PatchEmbedding(arguments.width)
    ours.load_state_dict(exported.state_dict())
    with torch.no_grad():
        expected = exported(patches, sizes)
        difference = float((ours(patches, grids) - expected).norm() / expected.norm())

    their_seconds, our_seconds = median_seconds(
        [lambda: forward_backward(exported, patches, sizes), lambda: forward_backward(ours, patches, grids)],
        arguments.repeats,
    )
    print(
        f"{len(PHOTOS)} photos at {IMAGE_SIZE} px, {len(patches) // 4:,} merged patches, {len(expected):,} visual rows"
    )
    print(f"width {arguments.width}, float32, {arguments.threads} threads, median of {arguments.repeats}")
    print(f"relative L2 distance of the two outputs: {difference:.1e}")
    print(f"{'forward + backward':32} {'seconds':>8} {'images/s':>9}")
    print(f"{'one image at a time':32} {their_seconds:8.3f} {len(PHOTOS) / their_seconds:9.2f}")
    print(f"{'flat patches, all images':32} {our_seconds:8.3f} {len(PHOTOS) / our_seconds:9.2f}")
    print(f"ratio {their_seconds / our_seconds:.2f}")


if __name__ == "__main__":
    main()
