"""EVE v2 under every layout: the loss and every gradient of a step are those of one process, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product

import pytest

from megatron_eve.models.name_rules import EXPERT_MARK
from tests.families.eve2_steps import CONTENTS, Run
from tests.families.steps import Outcome, Weights, furthest, one_step, weights_of
from tests.families.vila import PP2_UNEVEN, PP2_VPP2
from tests.layouts import CP2, DP2, ONE, PP2, PP4, TP2, TP2_PP2, TP2_SP, TP2_SP_CP2, Layout
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

# The language loss is computed in float32 (`language_losses`): key biases, which have next to no gradient, differ by up
# to 2e-8. With a loss in float64 all gradients under TP 2 are within 1e-14.
LOSS, GRADIENT = 2e-7, 1e-7

LAYOUTS = (TP2, TP2_SP, PP2, PP4, PP2_VPP2, PP2_UNEVEN, CP2, TP2_PP2, TP2_SP_CP2, DP2)
RUNS = tuple(Run(content, stage) for content, stage in product(CONTENTS, (1, 2)))
# Each layout once, and each kind of run with some.
FAST = {
    (TP2, Run("lone")),
    (TP2_SP, Run("mixed")),
    (PP2, Run("text", 1)),
    (PP4, Run("visual", 1)),
    (PP2_VPP2, Run("text")),
    (CP2, Run("lone")),
    (TP2_PP2, Run("mixed", 1)),
    (TP2_SP_CP2, Run("mixed")),
    (DP2, Run("lone", 1)),
}


@pytest.fixture(scope="module")
def weights(ranks: RankPool) -> Weights:
    return ranks.run(1, weights_of, Run())[0]


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, weights: Weights) -> Callable[[Run], Outcome]:
    return cache(lambda run: ranks.run(1, one_step, run, ONE.parallel, weights)[0])


@pytest.mark.parametrize(
    ("layout", "run"),
    [
        pytest.param(
            layout,
            run,
            id=f"{layout.name}-{run}",
            marks=() if (layout, run) in FAST else pytest.mark.slow,
        )
        for layout in LAYOUTS
        for run in RUNS
    ],
)
def test_the_layout_changes_nothing(
    layout: Layout,
    run: Run,
    ranks: RankPool,
    weights: Weights,
    one_process: Callable[[Run], Outcome],
) -> None:
    expected = one_process(run)
    found = ranks.run(layout.world_size, one_step, run, layout.parallel, weights)[-1]
    assert found.loss == pytest.approx(expected.loss, rel=LOSS)
    error, name = furthest(found, expected)
    assert error < GRADIENT, name


@pytest.mark.parametrize("mistake", ["class row is text", "one norm", "unsorted attention"])
def test_mistakes_are_noticed(
    mistake: str, ranks: RankPool, weights: Weights, one_process: Callable[[Run], Outcome]
) -> None:
    run = replace(Run(), mistake=mistake)
    found = ranks.run(1, one_step, run, ONE.parallel, weights)[0]
    assert abs(found.loss / one_process(Run()).loss - 1) > 1e-6


@pytest.mark.parametrize("layout", [ONE, TP2_SP], ids=["one process", "TP2+SP"])
def test_text_alone_is_that_of_a_decoder_without_experts(
    layout: Layout, ranks: RankPool, weights: Weights
) -> None:
    """Bit for bit: the loss, and every gradient that both have; those of experts are zero."""
    found, dense = (
        ranks.run(layout.world_size, one_step, Run("text", experts=experts), layout.parallel, weights)[-1]
        for experts in (True, False)
    )
    assert found.loss == dense.loss
    for name, gradient in found.gradients.items():
        if EXPERT_MARK in name:
            assert not gradient.any(), name
        else:
            assert gradient.equal(dense.gradients[name]), name


def test_copies_of_the_text_weights_are_a_decoder_without_experts(ranks: RankPool, weights: Weights) -> None:
    """On pictures, too: each row meets the same numbers, in products of other shapes."""
    copied = {name: weights[name.replace(EXPERT_MARK, ".")] for name in weights}
    found, dense = (
        ranks.run(1, one_step, Run(experts=experts), ONE.parallel, copied)[0] for experts in (True, False)
    )
    assert found.loss == pytest.approx(dense.loss, rel=LOSS)
