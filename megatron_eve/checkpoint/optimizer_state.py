"""The optimizer's state, made where a checkpoint needs it before the first update has."""

from __future__ import annotations

import torch
from megatron.core.optimizer import MegatronOptimizer


def make_moments(optimizer: MegatronOptimizer) -> None:
    """Make Adam's moments, all zero, where no update has made them yet; afterwards a checkpoint can hold them.

    Until its first update the optimizer has no state, which megatron-core's `sharded_state_dict` takes for granted: a
    run whose first step is left out saves before it. An update by zero gradients at rate 0 is how megatron-core makes
    the state when it loads (`_init_optimizer_states_with_dummy_values`); the count of updates is put back to 0.
    """
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = one.optimizer
        if inner.state or not any(group["params"] for group in inner.param_groups):
            continue
        kept = [{name: group[name] for name in ("lr", "weight_decay")} for group in inner.param_groups]
        for group in inner.param_groups:
            group.update(lr=0.0, weight_decay=0.0)
            for parameter in group["params"]:
                if parameter.numel():  # TransformerEngine's optimizer takes no empty tensor
                    parameter.grad = torch.zeros_like(parameter)
        inner.step()
        inner.zero_grad()
        for group, settings in zip(inner.param_groups, kept, strict=True):
            group.update(settings, step=0)
