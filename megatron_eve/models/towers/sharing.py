"""Pictures through a vision tower, frozen or trained, shared out over the ranks that share a pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_eve.models.model_parts import ImageShare
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.runtime.transfer import to_device


def shared_features(
    tower: Callable[[torch.Tensor], torch.Tensor], pictures: torch.Tensor, count: int
) -> torch.Tensor:
    """Features of all images of a pack.

    Each rank computes its share of the images; collective over the ranks that share the pack, unless it has no
    image. The features can be differentiated, for a tower that trains. Each rank then has the gradients of its own
    images, `tp` times too large, so that their average over the tensor-parallel ranks is the sum: the tower's
    parameters carry `average_gradients_across_tp_domain`, which megatron-core's finalize_model_grads obeys.

    Args:
        tower: uint8 [i, S, S, 3] -> [i, patches, K], i = 0 included; the same on all of these ranks.
        pictures: uint8 [i, S, S, 3], this rank's share (`ImageShare`).
        count: images of the pack.

    Returns:
        [count or more * patches, K], image after image.
    """
    own = tower(to_device(pictures, accelerator().device))
    ranks = parallel_state.get_tensor_and_context_parallel_world_size()
    if ranks == 1 or not count:
        return own.flatten(0, 1)
    each = ImageShare(parallel_state.get_tensor_and_context_parallel_rank(), ranks).each(count)
    padding = own.new_zeros(each - len(own), *own.shape[1:])
    gathered: torch.Tensor = _Gather.apply(torch.cat([own, padding]))
    return gathered.flatten(0, 1)


class _Gather(torch.autograd.Function):
    """[each, patches, K] on each rank -> [ranks * each, patches, K] on all."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_tensor_and_context_parallel_group()
        gathered = own.new_empty(group.size() * len(own), *own.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, own, group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        # Tensor-parallel ranks, neighbours in the group, have the same gradient; that of a context-parallel rank is of
        # the rows that it holds.
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        context = parallel_state.get_context_parallel_world_size()
        each = len(gradient) // (context * tensor)
        shares = gradient.unflatten(0, (context, tensor, each))
        mine = shares[:, parallel_state.get_tensor_model_parallel_rank()].flatten(0, 1).contiguous()
        if context > 1:
            own = torch.empty_like(mine[:each])
            group = parallel_state.get_context_parallel_group()
            torch.distributed.reduce_scatter_tensor(own, mine, group=group)
            mine = own
        return mine * tensor
