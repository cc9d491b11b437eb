"""The patch embedding layer of EVE v2 (arXiv 2502.06788, section 3.2): two convolutions, without positions or norms.

Both convolutions have their stride for a kernel, so they are matrix products over patches, for all images of a pack at
once. Parameters have the published names and shapes (`model.vision_tower`), and initial values as torch's own layers
have them; class and split embedding are drawn from N(0, 1). Replicated over the tensor-parallel ranks: each computes it
on the same patches.

Shapes: P = patches of 16 pixels, N = P / 4, I = images, V = image rows (1 + rows * (columns + 1) an image), C = width
between the convolutions, D = decoder width.
"""

from __future__ import annotations

from typing import cast

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.nn import functional

from megatron_eve.models.eve2.config import EVE2Config
from megatron_eve.models.eve2.geometry import MERGE, PATCH_SIZE
from megatron_eve.models.image_rows import row_indices
from megatron_eve.models.model_parts import VisualInputs
from megatron_eve.models.normalise import normalise
from megatron_eve.models.replicated import replicated


class PatchEmbedding(nn.Module):
    """Pixels of all images of a microbatch to rows: a class row, then each row of the grid with a split row behind it.

    Args:
        width: C.
        hidden_size: D.
    """

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(hidden_size))
        self.split_embedding = nn.Parameter(torch.randn(hidden_size))
        # The published numbers of an `nn.Sequential`, in which a GELU lies between them.
        self.patch_embedding = nn.ModuleDict(
            {
                "0": nn.Conv2d(3, width, PATCH_SIZE, stride=PATCH_SIZE),
                "2": nn.Conv2d(width, hidden_size, MERGE, stride=MERGE),
            }
        )

    def forward(self, patches: torch.Tensor, image_grids: torch.Tensor) -> torch.Tensor:
        """Embed the images of a pack.

        Args:
            patches: uint8 [P, 768]: cells of 2 x 2 patches row by row, in each its four patches row by row, in a patch
                (channel, y, x).
            image_grids: int64 [I, 2], rows and columns of cells of each image, on the host.

        Returns:
            [V, D], images in order, in the dtype of the parameters.
        """
        first, second = (cast(nn.Conv2d, self.patch_embedding[name]) for name in ("0", "2"))
        pixels = normalise(patches, first.weight.dtype)
        embedded = functional.gelu(functional.linear(pixels, first.weight.flatten(1), first.bias))  # (P, C)
        # (D, C, y, x) to the order of a cell's values: patch by patch.
        weight = second.weight.permute(0, 2, 3, 1).flatten(1)
        cells = functional.linear(embedded.view(-1, weight.shape[1]), weight, second.bias)  # (N, D)
        layout = row_indices(image_grids).to(cells.device)
        rows = torch.cat([layout.cls_rows, layout.split_rows, layout.merged_rows])
        classes = self.class_embedding.expand(len(layout.cls_rows), -1)
        splits = self.split_embedding.expand(len(layout.split_rows), -1)
        return cells.new_empty(len(rows), cells.shape[1]).index_copy_(
            0, rows, torch.cat([classes, splits, cells])
        )


class EVE2FrontEnd(MegatronModule):
    """The patch embedding layer (`vision_tower` of the published model)."""

    def __init__(self, config: TransformerConfig, vision: EVE2Config) -> None:
        super().__init__(config=config)
        embedding = PatchEmbedding(vision.patch_embedding_size, config.hidden_size)
        self.patch_embedding = replicated(embedding, config)

    def forward(self, inputs: VisualInputs) -> torch.Tensor:
        """Rows of the images of a pack, [V, D], from the view "patches"."""
        rows: torch.Tensor = self.patch_embedding(inputs.pixels["patches"], inputs.grids)
        return rows
