"""Bytes of patches to normalised numbers, in the dtype and width that the patch embedding multiplies.

A byte has 256 values and a patch three colours, so a table of 768 numbers holds every result, bit for bit what the
published image processor gives. On a GPU one kernel looks them up (`normalise_kernel.py`) and writes rows of 592: 588
values of 2 bytes are no multiple of 16 bytes, which the fast matrix products of cuBLAS ask of a row.

Letters: P = patches, K = 588 = 3 * 14 * 14 values of a patch.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from megatron_eve.models.eve.constants import CLIP_MEAN, CLIP_STD

COLOURS, VALUES = 3, 256
_ALIGNMENT = 16  # values: 32 bytes in bfloat16


def normalise(patches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Normalise patches.

    Args:
        patches: uint8 [P, K], each (channel, y, x).
        dtype: of the result, rounded once from float32.

    Returns:
        [P, K]; on a GPU with Triton [P, K rounded up to 16], filled up with zeros.
    """
    if patches.is_cuda and _triton_is_installed():
        from megatron_eve.models.eve.normalise_kernel import look_up

        return look_up(patches, _table(dtype, patches.device), _ALIGNMENT)
    mean, std = _constants(patches.device)
    colours = patches.float().unflatten(1, (COLOURS, -1))  # (P, 3, 196)
    return colours.div_(VALUES - 1).sub_(mean).div_(std).view(patches.shape).to(dtype)


@cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [3, 1] each. Kept: a list that goes to a GPU makes it wait."""
    return torch.tensor(CLIP_MEAN, device=device)[:, None], torch.tensor(CLIP_STD, device=device)[:, None]


@cache
def _table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[3, 256], what becomes of each byte of each colour; computed on the host, as the reference is."""
    mean, std = _constants(torch.device("cpu"))
    values = torch.arange(VALUES, dtype=torch.float32).expand(COLOURS, -1)
    return ((values / (VALUES - 1) - mean) / std).to(dtype).to(device)


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
