"""The CPU recipe: what it changes, that it refuses another megatron-core, and that its Adam is AdamW."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import pytest
import torch

from megatron_eve.runtime import without_cuda
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.runtime.adam import FusedAdam

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the recipe is for machines without CUDA")


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_is_adamw(decay: float) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(5, 3), torch.randn(7)]

    def train(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(w.clone()) for w in weights]
        optimizer = make(params)
        for step in range(10):
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            optimizer.step()
        return [p.detach() for p in params]

    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay}
    ours = train(lambda p: FusedAdam(p, **settings))  # type: ignore[arg-type]
    theirs = train(lambda p: torch.optim.AdamW(p, **settings))  # type: ignore[arg-type]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_adam_counts_steps_in_the_group() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedAdam([parameter], lr=1e-3)
    for _ in range(3):
        parameter.grad = torch.ones(2)
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 3
    assert set(optimizer.state[parameter]) == {"exp_avg", "exp_avg_sq"}


def test_adam_without_decoupled_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="AdamW"):
        FusedAdam([torch.nn.Parameter(torch.ones(1))], adam_w_mode=False)


@needs_cpu
def test_another_megatron_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.0")
    with pytest.raises(RuntimeError, match=r"tested with megatron-core 0.16.1, found 0.17.0"):
        without_cuda.install.__wrapped__()


@needs_cpu
def test_cuda_places_answer_with_the_cpu() -> None:
    assert accelerator().backend == "gloo"
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.empty(2, device="cuda").device.type == "cpu"
    assert torch.zeros_like(torch.ones(1), device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.ones(2).type() == "torch.cuda.FloatTensor"
    assert isinstance(torch.ones(1, dtype=torch.bfloat16), torch.cuda.BFloat16Tensor)
    assert not isinstance(torch.ones(1), torch.cuda.BFloat16Tensor)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.ones(1).cuda().device.type == "cpu"


@needs_cpu
def test_the_random_state_is_the_cpu_generators() -> None:
    accelerator()
    torch.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))
