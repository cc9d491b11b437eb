"""FP8's delayed state is restored after a forward pass that must not change it; layers here are placeholders."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_eve.config import RunConfig
from megatron_eve.models.decoder.next_token import NextToken
from megatron_eve.models.model_parts import SampleCounts
from megatron_eve.training.loop import evaluation, step
from megatron_eve.training.loop.fp8_state import snapshot_fp8_state
from megatron_eve.training.loop.loss import Normalizer


class Layer(torch.nn.Module):
    """One that notes the largest value it saw, from its first pass on, as TransformerEngine's layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.maximum: torch.Tensor | None = None

    def forward(self, x: float) -> None:
        self.maximum = torch.tensor(max(x, float(self.maximum or 0.0)))

    def get_fp8_meta_tensors(self) -> torch.Tensor | None:
        return None if self.maximum is None else self.maximum.clone()

    def reset_fp8_meta_tensors(self, tensors: torch.Tensor | None = None) -> None:
        if self.maximum is not None:
            self.maximum.copy_(torch.tensor(0.0) if tensors is None else tensors)


class Chunk(torch.nn.Module):
    def __init__(self, fp8: str | None = "hybrid", recipe: str = "delayed") -> None:
        super().__init__()
        self.config = SimpleNamespace(fp8=fp8, fp8_recipe=recipe)
        self.decoder = torch.nn.Sequential(Layer(), torch.nn.Linear(1, 1), Layer())

    def see(self, x: float) -> None:
        self.decoder[0](x)

    @property
    def seen(self) -> float:
        return float(self.decoder[0].maximum)  # type: ignore[arg-type]

    def zero_grad_buffer(self) -> None: ...


def test_scales_are_put_back_as_often_as_wanted() -> None:
    chunk = Chunk()
    first = snapshot_fp8_state([chunk])
    chunk.see(2.0)
    second = snapshot_fp8_state([SimpleNamespace(module=chunk)])  # as DDP wraps it
    chunk.see(7.0)
    for put_back, expected in ((second, 2.0), (second, 2.0), (first, 0.0)):
        chunk.see(9.0)
        put_back()
        assert chunk.seen == expected


@pytest.mark.parametrize("chunk", [Chunk(None), Chunk(recipe="tensorwise")], ids=["bfloat16", "tensorwise"])
def test_what_has_no_scales_is_left_alone(chunk: Chunk) -> None:
    put_back = snapshot_fp8_state([chunk])
    chunk.see(2.0)
    put_back()
    assert chunk.seen == 2.0


def test_evaluation_leaves_scales_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = Chunk()
    chunk.see(2.0)
    monkeypatch.setattr(evaluation, "_steps", lambda *_: ())
    monkeypatch.setattr(evaluation, "_losses", lambda *_: chunk.see(5.0) or {"lm loss": 1.0})
    chunks: list[Any] = [chunk]
    found = evaluation.evaluate(RunConfig(), chunks, SimpleNamespace(), [SimpleNamespace(name="held out")])  # type: ignore[arg-type, list-item]
    assert found == {"held out": {"lm loss": 1.0}} and chunk.seen == 2.0


@pytest.mark.parametrize(
    ("losses", "begins", "ends"),
    [([1.0], [2.0], 3.0), ([1.0, 1.0], [2.0, 2.0], 3.0), ([float("nan")], [2.0], 2.0)],
    ids=["a step", "a step run again", "a step left out"],
)
def test_only_the_step_that_counts_moves_scales(
    monkeypatch: pytest.MonkeyPatch, losses: list[float], begins: list[float], ends: float
) -> None:
    chunk, found, todo = Chunk(), [], list(losses)
    chunk.see(2.0)

    def forward_backward(*_: Any, **__: Any) -> dict[str, torch.Tensor]:
        found.append(chunk.seen)
        chunk.see(chunk.seen + 1.0)
        return {"lm loss": torch.tensor(todo.pop(0))}

    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    machine = SimpleNamespace(
        should_run_forward_backward=lambda _: bool(todo),
        should_checkpoint_and_exit=lambda: (False, False, 0),
    )
    optimizer = SimpleNamespace(
        config=SimpleNamespace(clip_grad=1.0), zero_grad=nothing, prepare_grads=nothing, step=nothing,
        get_grad_norm=lambda: 1.0,
    )  # fmt: skip
    monkeypatch.setattr(step, "get_rerun_state_machine", lambda: machine)
    monkeypatch.setattr(step, "forward_backward", forward_backward)
    monkeypatch.setattr(step, "validate_step", nothing)
    monkeypatch.setattr(step, "_share", lambda shares, norm: ({"lm loss": float(shares["lm loss"])}, norm))
    chunks: list[Any] = [chunk]
    step.train_step(
        chunks, optimizer, SimpleNamespace(), Normalizer((NextToken(),), SampleCounts(1, 1), 1, 1, 1)
    )  # type: ignore[arg-type]
    assert found == begins and chunk.seen == ends
