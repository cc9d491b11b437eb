"""Pictures through a vision tower, shared out over the ranks that share a pack; with gradients where the tower trains.

Each of these tp x cp ranks runs the tower on its share of the pictures, and the features are gathered. In the backward
pass each rank takes the gradient of its own features: the tensor-parallel ranks have the same one, since what the
features go into is computed on all of them alike, and those of context-parallel ranks, which hold other rows, are
added. The tower's parameters carry the mark `average_gradients_across_tp_domain`, by which megatron-core averages their
gradients over the tensor-parallel ranks (`finalize_model_grads`), so the gradient of the features is multiplied by tp.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from megatron.core import parallel_state

from megatron_eve.models.model_parts import ImageShare
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.runtime.transfer import to_device


class Tower(Protocol):
    """A vision tower on this rank's device.

    Attributes:
        patches: features of each picture.
        width: K.
        dtype: of the features.
        trains: do any of its parameters train?
    """

    width: int

    @property
    def dtype(self) -> torch.dtype:
        """See above."""
        ...

    @property
    def patches(self) -> int:
        """See above."""
        ...

    @property
    def trains(self) -> bool:
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
        [count * patches, K], image after image.
    """
    device = accelerator().device
    ranks = parallel_state.get_tensor_and_context_parallel_world_size()
    each = ImageShare(parallel_state.get_tensor_and_context_parallel_rank(), ranks).each(count)
    if len(pictures) or tower.trains:
        # Parameters that train have a gradient on every rank, so that its reduction, which waits for all, begins.
        given = pictures if len(pictures) else pictures.new_zeros(1, *pictures.shape[1:])
        features = tower(to_device(given, device))[: len(pictures)]
    else:
        features = torch.zeros(0, tower.patches, tower.width, dtype=tower.dtype, device=device)
    if ranks > 1 and count:
        missing = features.new_zeros(each - len(features), *features.shape[1:])
        features = _Gather.apply(torch.cat([features, missing]) if len(missing) else features)
    return features[:count].flatten(0, 1)


class _Gather(torch.autograd.Function):
    """Features of each rank, [i, patches, K], to those of all: [ranks * i, patches, K]; see the top of this module."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_tensor_and_context_parallel_group()
        gathered = own.new_empty(group.size() * len(own), *own.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, own.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        group = parallel_state.get_tensor_and_context_parallel_group()
        if parallel_state.get_context_parallel_world_size() > 1:
            grad = grad.contiguous()
            torch.distributed.all_reduce(grad, group=parallel_state.get_context_parallel_group())
        each = len(grad) // group.size()
        own = grad[group.rank() * each : (group.rank() + 1) * each]
        return own * parallel_state.get_tensor_model_parallel_world_size()
