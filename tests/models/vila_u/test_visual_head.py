"""The head of the visual loss: memory of its chunks, rows of packs, and a step with no row at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_eve.config import ParallelConfig
from tests.families.vila_u import run_config
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

POSITIONS, DEPTH, CODES = 60, 16, 512


class Largest(TorchDispatchMode):
    """The most elements of any float32 tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, torch.Tensor) and one.dtype == torch.float32:
                self.elements = max(self.elements, one.numel())
        return made


def largest(chunk: int | None, positions: int) -> tuple[int, float, list[bool], dict[str, torch.Tensor]]:
    """Runs on one rank: forward and backward of a head; the largest tensor, the loss, which parameters got a gradient,
    and the gradients."""
    from dataclasses import replace

    from megatron_eve.models.build import transformer_config
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.models.vila_u.visual_head import VisualHead, VisualHeadInputs

    config = run_config(ParallelConfig())
    vision = replace(
        config.vision, codes_per_position=DEPTH, visual_codebook_size=CODES, visual_loss_chunk=chunk
    )
    with model_parallel(config):
        torch.manual_seed(0)
        head = VisualHead(transformer_config(config), vision).double()
        draw = torch.Generator().manual_seed(1)
        hidden = torch.randn(positions + 4, 1, config.model.hidden_size, generator=draw, dtype=torch.float64)
        codes = torch.randint(0, CODES, (positions, DEPTH), generator=draw)
        with Largest() as watch:
            losses = head(
                hidden.requires_grad_(), None, None, VisualHeadInputs(torch.arange(positions), codes)
            )
            losses.sum().backward()
        trained = {name: p.grad for name, p in head.named_parameters() if p.requires_grad}
        trained["hidden"] = hidden.grad
    found = {name: gradient for name, gradient in trained.items() if gradient is not None}
    return watch.elements, float(losses.sum()), [gradient is not None for gradient in trained.values()], found


def test_no_tensor_of_all_logits(ranks: RankPool) -> None:
    """In chunks, float32 logits of one chunk at most are there, and the loss and all gradients are the same."""
    whole, expected, _, gradients = ranks.run(1, largest, None, POSITIONS)[0]
    assert whole >= POSITIONS * DEPTH * CODES
    for chunk in (1, 7):
        some, loss, _, found = ranks.run(1, largest, chunk, POSITIONS)[0]
        assert some <= max(chunk * DEPTH * CODES, (CODES + 1) * 32)
        assert loss == pytest.approx(expected, rel=1e-6)  # the cross entropy is float32
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("chunk", [None, 7])
def test_no_rows_reach_every_parameter(ranks: RankPool, chunk: int | None) -> None:
    """So that gradients are reduced on ranks whose pack has nothing to draw, too."""
    _, loss, reached, gradients = ranks.run(1, largest, chunk, 0)[0]
    assert loss == 0 and all(reached)
    assert all(not gradient.any() for gradient in gradients.values())
