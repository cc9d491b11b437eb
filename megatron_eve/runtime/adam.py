"""AdamW for machines without TransformerEngine, with the state layout of its FusedAdam.

The distributed optimizer's `fully_reshardable` checkpoint format expects `step` in the parameter group, not in
every parameter's state as `torch.optim.AdamW` keeps it; loading torch's own state raises KeyError 'step'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) with decoupled weight decay and one `step` per parameter group.

    Takes the arguments that megatron-core passes to TransformerEngine's FusedAdam; further ones, which choose
    between CUDA kernels, are ignored.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        **_: Any,
    ) -> None:
        if not adam_w_mode:
            raise ValueError(
                "only AdamW (decoupled weight decay) is implemented; set decoupled_weight_decay=True"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, in place; float32 state."""
        for group in self.param_groups:
            # Also in groups that are empty on this rank: a checkpoint stores the parameter groups of one rank for all.
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            if params:
                self._update(group, params, [p.grad for p in params])

    def _update(self, group: dict[str, Any], params: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        beta1, beta2 = group["betas"]
        step, lr = group["step"], group["lr"]
        mean = [self.state[p]["exp_avg"] for p in params]
        square = [self.state[p]["exp_avg_sq"] for p in params]
        torch._foreach_mul_(mean, beta1)
        torch._foreach_add_(mean, grads, alpha=1 - beta1)
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, grads, grads, value=1 - beta2)
        denominator = torch._foreach_div(square, 1 - beta2**step)
        torch._foreach_sqrt_(denominator)
        torch._foreach_add_(denominator, group["eps"])
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(params, mean, denominator, value=-lr / (1 - beta1**step))
