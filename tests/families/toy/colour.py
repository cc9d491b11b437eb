"""The module, the rows and the targets of the colour loss. R = rows of pictures on this rank, I = images of a pack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_eve.models.decoder.intermediate_features import mark_sequence_parallel
from megatron_eve.models.decoder.pack_rows import rows_on_rank
from megatron_eve.models.model_parts import Pack
from megatron_eve.models.towers.sharing import shared_features
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.runtime.transfer import to_device


@dataclass(frozen=True)
class ImageRows:
    """Rows of pictures on this rank, on the host.

    Attributes:
        rows: None: there are no intermediate features.
        here: int64 [R], rows of this rank's hidden states.
        images: int64 [R], the image of each among the pack's.
    """

    here: torch.Tensor
    images: torch.Tensor
    rows: None = None


def image_rows(pack: Pack, sequence_parallel: bool) -> ImageRows:
    """See `FamilyObjective.rows`."""
    image_of_row = torch.full((len(pack.tokens),), -1)
    for image, (start, count) in enumerate(
        zip(pack.image_starts.tolist(), pack.image_rows.tolist(), strict=True)
    ):
        image_of_row[start : start + count] = image
    images = image_of_row[rows_on_rank(pack, sequence_parallel)]
    return ImageRows((images >= 0).nonzero()[:, 0], images[images >= 0])


class ColourInputs(NamedTuple):
    """On the device: rows int64 [R], colours [R, 3], weights float32 [R]."""

    here: torch.Tensor
    colours: torch.Tensor
    weights: torch.Tensor


def colour_inputs(pack: Pack, rows: ImageRows, targets: torch.Tensor) -> ColourInputs:
    """See `FamilyObjective.inputs`; targets [I or more, 3]."""
    device = accelerator().device
    weights = 1 / pack.image_rows[rows.images].float()
    here, images, weights = (to_device(one, device) for one in (rows.here, rows.images, weights))
    return ColourInputs(here, targets[images], weights)


class ColourHead(torch.nn.Module):
    """One linear map, replicated over the tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.projection = torch.nn.Linear(config.hidden_size, 3, dtype=config.params_dtype)
        # Under sequence parallelism each rank sees its own rows only: megatron-core is to add the gradients up.
        mark_sequence_parallel(self, config)

    def forward(self, hidden: torch.Tensor, features: None, rows: None, inputs: ColourInputs) -> torch.Tensor:
        """Hidden states [n, 1, D] -> float32 scalar, the sum over images of the mean over rows; ranks' parts add up."""
        colours = self.projection(hidden[inputs.here, 0]).float()  # (R, 3)
        distance = (colours - inputs.colours).square().sum(1)
        return (distance * inputs.weights).sum()


def _pixels(images: torch.Tensor) -> torch.Tensor:
    """In place of a vision tower: a picture of one pixel is its feature. uint8 [i, 1, 1, 3] -> [i, 1, 3], 0 to 1."""
    return images.flatten(1, 2).float() / 255


class MeanColour:
    """Targets of a pack from the view "colour", which the ranks of a pack share out."""

    def __call__(self, pack: Pack) -> torch.Tensor:
        """[I or more, 3], 0 to 1. Collective over the ranks that share the pack."""
        return shared_features(_pixels, pack.pixels["colour"], len(pack.image_starts))
