"""Bytes of patches to normalised numbers, in the dtype of the model.

Letters: P = patches, K = values of a patch, 3 * side * side.
"""

from __future__ import annotations

from functools import cache

import torch

from megatron_eve.models.towers.normalisation import CLIP_MEAN, CLIP_STD


def normalise(patches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Normalise patches, bit for bit as the published image processor does.

    Args:
        patches: uint8 [P, K], each (channel, y, x).
        dtype: of the result, rounded once from float32.

    Returns:
        [P, K].
    """
    mean, std = _constants(patches.device)
    colours = patches.float().unflatten(1, (3, -1))  # (P, 3, K / 3)
    return colours.div_(255).sub_(mean).div_(std).view(patches.shape).to(dtype)


@cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [3, 1] each. Kept: a list that goes to a GPU makes it wait."""
    return torch.tensor(CLIP_MEAN, device=device)[:, None], torch.tensor(CLIP_STD, device=device)[:, None]
