"""The patch embedding of EVE v2 against two convolutions, one picture at a time, as published."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from megatron_eve.data.images.patches import cut_patches
from megatron_eve.models.eve2.front_end import PatchEmbedding
from megatron_eve.models.normalise import normalise

GRIDS = ((2, 3), (1, 1), (4, 1))


def test_rows_are_those_of_two_convolutions() -> None:
    torch.manual_seed(0)
    module = PatchEmbedding(24, 40).double()
    draw = np.random.default_rng(0)
    pictures = [
        draw.integers(0, 256, (32 * rows, 32 * columns, 3), dtype=np.uint8) for rows, columns in GRIDS
    ]
    patches = torch.from_numpy(np.concatenate([cut_patches(one, 16, 2) for one in pictures]))
    found = module(patches, torch.tensor(GRIDS))
    expected = []
    first, second = module.patch_embedding["0"], module.patch_embedding["2"]
    for one, (rows, columns) in zip(pictures, GRIDS, strict=True):
        pixels = torch.from_numpy(one).permute(2, 0, 1)
        floats = normalise(pixels.reshape(1, -1), torch.float64).view(1, 3, 32 * rows, 32 * columns)
        cells = second(functional.gelu(first(floats)))[0].permute(1, 2, 0)
        split = module.split_embedding.expand(rows, 1, -1)
        expected += [module.class_embedding[None], torch.cat([cells, split], 1).flatten(0, 1)]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-12)


def test_no_picture_gives_no_row_and_a_gradient_of_zero() -> None:
    module = PatchEmbedding(24, 40)
    rows = module(torch.empty(0, 768, dtype=torch.uint8), torch.empty(0, 2, dtype=torch.int64))
    assert rows.shape == (0, 40)
    rows.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
