"""Which teacher patches of a pack this rank aligns, and with which of its rows; host arithmetic on a pack.

Shapes: T = tokens of the pack, I = images, N = visual tokens (merged patches of 2 x 2), A = teacher patches inside
the pictures, R = those of this rank, r = tokens along each side of a teacher patch (1, or 2 for the HD model).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_eve.models.decoder.intermediate_features import FeatureRows
from megatron_eve.models.decoder.pack_rows import pack_group, rows_on_rank
from megatron_eve.models.model_parts import Pack
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.runtime.transfer import to_device


@dataclass(frozen=True)
class AlignedRows:
    """What the aligning layer of this rank works on. Tensors on the host.

    Attributes:
        rows: which rows of the hidden states become features.
        images: int64 [R], image of each row among the pack's; -1 for rows that only fill up an equal share.
        patches: int64 [R, 2], row and column of its teacher patch inside the picture.
        grids: int64 [I, 2], the pictures in teacher patches.
    """

    rows: FeatureRows
    images: torch.Tensor
    patches: torch.Tensor
    grids: torch.Tensor

    def weights(self) -> torch.Tensor:
        """float32 [R]: one over the teacher patches of the row's image, 0 for filling rows."""
        sizes = self.grids.prod(dim=1)
        weights = torch.zeros(len(self.images))
        real = self.images >= 0
        weights[real] = 1.0 / sizes[self.images[real]].float()
        return weights

    def teacher_index(self, side: int) -> torch.Tensor:
        """int64 [R]: place of each row's patch among the I * side * side patches of the teacher's square images.

        The picture lies in the middle of its square; of an odd rest the larger part is behind it, as published.
        """
        margins = (side - self.grids) // 2
        images = self.images.clamp(min=0)
        place = self.patches + margins[images]
        return (images * side + place[:, 0]) * side + place[:, 1]


def aligned_rows(pack: Pack, pooling: int, sequence_parallel: bool) -> AlignedRows:
    """Lay out the intermediate features of a pack for this rank.

    Args:
        pack: on the host.
        pooling: r.
        sequence_parallel: the rank holds only its share of the rows.
    """
    mine = rows_on_rank(pack, sequence_parallel)
    place = torch.full((len(pack.tokens),), -1)
    place[mine] = torch.arange(len(mine))

    images, rows, columns = _positions(pack.image_grids)
    pack_rows = pack.image_starts[images] + 1 + rows * (pack.image_grids[images, 1] + 1) + columns
    here = place[pack_rows]
    held = (here >= 0).nonzero()[:, 0]  # [c] this rank's visual tokens
    grids = pack.image_grids // pooling
    device = accelerator().device
    local = to_device(here[held], device)
    if pooling == 1:
        taken = FeatureRows(len(mine), local, len(held))
        return AlignedRows(taken, images[held], torch.stack([rows[held], columns[held]], 1), grids)

    first = grids.prod(dim=1).cumsum(0) - grids.prod(dim=1)  # [I] teacher patches before each image's
    patch = first[images] + rows // pooling * grids[images, 1] + columns // pooling
    slot = (patch * pooling + rows % pooling) * pooling + columns % pooling
    group = pack_group(sequence_parallel)
    shares, share = (1, 0) if group is None else (group.size(), group.rank())
    patch_images, patch_rows, patch_columns = _positions(grids)
    count = -(-len(patch_images) // shares)
    taken = FeatureRows(len(mine), local, count, pooling, to_device(slot[held], device), group)
    # Equal shares: the last ranks' may reach beyond the patches there are.
    own = torch.arange(share * count, (share + 1) * count)
    real = own < len(patch_images)
    images, patches = torch.full((count,), -1), torch.zeros(count, 2, dtype=torch.int64)
    images[real] = patch_images[own[real]]
    patches[real] = torch.stack([patch_rows, patch_columns], 1)[own[real]]
    return AlignedRows(taken, images, patches, grids)


def _positions(grids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(image, row, column) of every merged patch of the grids [I, 2], image after image, row by row: int64 [N] each."""
    counts = grids.prod(dim=1)
    images = torch.arange(len(grids)).repeat_interleave(counts)
    index = torch.arange(len(images)) - (counts.cumsum(0) - counts)[images]
    columns = grids[images, 1]
    return images, index // columns, index % columns
