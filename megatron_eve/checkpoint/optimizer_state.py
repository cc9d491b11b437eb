"""Initializes the optimizer's state for a checkpoint that is saved before the first update."""

from __future__ import annotations

import torch
from megatron.core.optimizer import MegatronOptimizer


def make_moments(optimizer: MegatronOptimizer) -> None:
    """Create Adam's moments, all zero, if no update has created them yet, so that a checkpoint can be saved.

    Before its first update the optimizer has no state, but megatron-core's `sharded_state_dict` requires it; a run that
    skips its first step saves like that. As megatron-core does when it loads
    (`_init_optimizer_states_with_dummy_values`), this makes an update with zero gradients at learning rate 0; then the
    count of updates is reset to 0.
    """
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = one.optimizer
        if inner.state or not any(group["params"] for group in inner.param_groups):
            continue
        kept = [{name: group[name] for name in ("lr", "weight_decay")} for group in inner.param_groups]
        for group in inner.param_groups:
            group.update(lr=0.0, weight_decay=0.0)
            for parameter in group["params"]:
                if parameter.numel():  # TransformerEngine's optimizer does not accept empty tensors
                    parameter.grad = torch.zeros_like(parameter)
        inner.step()
        inner.zero_grad()
        for group, settings in zip(inner.param_groups, kept, strict=True):
            group.update(settings, step=0)
