"""Rows of images with a class row in front and a row-end row behind each row of their grid.

Letters: I = images, N = merged patches, V = visual rows (for each image 1 + rows * (columns + 1)).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_eve.runtime.transfer import to_device


class RowIndices(NamedTuple):
    """Where the rows of a microbatch's images lie among its V visual rows. All int64."""

    images: Tensor
    """[N] the image of each merged patch."""
    cls_rows: Tensor
    """[I] row of each CLS."""
    split_rows: Tensor
    """[sum of grid rows] row of each row-end token."""
    merged_rows: Tensor
    """[N] row of each merged patch."""

    def to(self, device: torch.device) -> RowIndices:
        """The same on a device."""
        return RowIndices(*(to_device(index, device) for index in self))


def row_indices(image_grids: Tensor) -> RowIndices:
    """Builds the layout of the visual rows from the grid sizes alone, on the device that holds them.

    Args:
        image_grids: [I, 2] int64, rows and columns of merged patches. Sizes of the result depend on the values, so a
            grid on an accelerator costs a synchronisation.
    """
    rows, columns = image_grids.unbind(dim=1)
    numbers = torch.arange(len(image_grids), device=image_grids.device)
    lengths = 1 + rows * (columns + 1)
    starts = lengths.cumsum(0) - lengths

    counts = rows * columns
    images = numbers.repeat_interleave(counts)
    place = torch.arange(len(images), device=image_grids.device) - (counts.cumsum(0) - counts)[images]
    row_images = numbers.repeat_interleave(rows)
    row = torch.arange(len(row_images), device=image_grids.device) - (rows.cumsum(0) - rows)[row_images]
    return RowIndices(
        images=images,
        cls_rows=starts,
        split_rows=starts[row_images] + (row + 1) * (columns[row_images] + 1),
        # Before a merged patch lie CLS, the image's earlier ones, and a row end for each full row of them.
        merged_rows=starts[images] + 1 + place + place // columns[images],
    )
