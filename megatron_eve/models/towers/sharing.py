"""Pictures through a frozen vision tower, shared out over the ranks that share a pack."""

from __future__ import annotations

from typing import Protocol

import torch
from megatron.core import parallel_state

from megatron_eve.models.model_parts import ImageShare
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.runtime.transfer import to_device


class Tower(Protocol):
    """A frozen vision tower on this rank's device.

    Attributes:
        patches: features of each picture.
        width: K.
        dtype: of the features.
    """

    width: int
    dtype: torch.dtype

    @property
    def patches(self) -> int:
        """See above."""
        ...

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [i, S, S, 3] -> [i, patches, K]."""
        ...


def shared_features(tower: Tower, pictures: torch.Tensor, count: int) -> torch.Tensor:
    """Features of all images of a pack.

    Each rank computes its share of the images; collective over the ranks that share the pack, unless it has no
    image.

    Args:
        tower: the same on all of these ranks.
        pictures: uint8 [i, S, S, 3], this rank's share (`ImageShare`).
        count: images of the pack.

    Returns:
        [count or more * patches, K], image after image.
    """
    device = accelerator().device
    ranks = parallel_state.get_tensor_and_context_parallel_world_size()
    each = ImageShare(parallel_state.get_tensor_and_context_parallel_rank(), ranks).each(count)
    features = torch.zeros(each, tower.patches, tower.width, dtype=tower.dtype, device=device)
    if len(pictures):
        features[: len(pictures)] = tower(to_device(pictures, device))
    if ranks == 1 or not count:
        return features.flatten(0, 1)
    gathered = features.new_empty(ranks * each, tower.patches, tower.width)
    group = parallel_state.get_tensor_and_context_parallel_group()
    torch.distributed.all_gather_into_tensor(gathered, features, group=group)
    return gathered.flatten(0, 1)
