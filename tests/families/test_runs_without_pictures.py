"""Runs in which what works on pictures trains, with a step of text alone and steps in which a rank has no picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_eve.config import RunConfig
from megatron_eve.config.recipe import parse
from megatron_eve.training.loop.data import open_data
from tests.families.suite import Trace, run
from tests.layouts import DP2, ONE, TP2_SP, Layout, parametrize
from tests.ranks import RankError, RankPool

pytestmark = pytest.mark.distributed

STEPS = 7
# Pictures of each step with this seed, whose steps have two samples.
SEED, PICTURES = 31, [2, 0, 2, 2, 2, 1, 1]
# A vision tower, whose activations are kept in one process and recomputed under a layout; and experts.
FLAGS = {"vila_tiny": ("--stage", "3", "--no-freeze-ViT"), "eve2_tiny": ("--stage", "2")}
MORE = {"vila_tiny": ("--recompute-vision",), "eve2_tiny": ()}


def config(preset: str, layout: Layout, *flags: str) -> RunConfig:
    common = ["--preset", preset, "--mock-data", "--seq-length", "512", "--global-batch-size", "2"]
    common += ["--train-iters", str(STEPS), "--lr", "1e-3", "--seed", str(SEED)]
    parsed = parse([*common, *FLAGS[preset], *flags])
    sizes = {"overlap_grad_reduce": parsed.parallel.overlap_grad_reduce}
    sizes["overlap_param_gather"] = parsed.parallel.overlap_param_gather
    return replace(parsed, parallel=replace(layout.parallel, **sizes))


@pytest.fixture(scope="module", params=FLAGS)
def preset(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, preset: str) -> Trace:
    return ranks.run(1, run, config(preset, ONE))[0]


def test_the_steps_are_what_they_are_said_to_be(preset: str) -> None:
    data = open_data(config(preset, ONE))
    samples = data.order(np.arange(2 * STEPS))
    assert data.dataset.samples["num_images"][samples].reshape(-1, 2).sum(1).tolist() == PICTURES


@parametrize(DP2, TP2_SP)
def test_overlapped_exchanges_do_not_wait_for_pictures(
    ranks: RankPool, one_process: Trace, preset: str, layout: Layout
) -> None:
    """Losses are those of one process."""
    flags = ("--overlap-grad-reduce", "--overlap-param-gather", *MORE[preset])
    trace = ranks.run(2, run, config(preset, layout, *flags))[-1]
    assert trace.samples == one_process.samples
    assert len(trace.losses) == STEPS
    assert trace.losses == pytest.approx(one_process.losses, abs=1e-5, rel=0)


def run_without_empty_sides(config: RunConfig) -> Trace:
    """Runs on each rank: the run, with linear layers that leave out a set of weights that has no rows."""
    import torch

    from megatron_eve.models.decoder.experts import ExpertLinear

    right = ExpertLinear.multiplied

    def multiplied(self: ExpertLinear, x: torch.Tensor) -> torch.Tensor:
        if self.rows.text < len(x):
            return right(self, x)
        return torch.nn.functional.linear(x, self.weight, self.bias)

    ExpertLinear.multiplied = multiplied  # type: ignore[method-assign]
    try:
        return run(config)
    finally:
        ExpertLinear.multiplied = right  # type: ignore[method-assign]


def test_an_empty_side_without_a_gradient_is_noticed(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="Communication call has not been issued"):
        ranks.run(2, run_without_empty_sides, config("eve2_tiny", DP2, "--overlap-grad-reduce"))
