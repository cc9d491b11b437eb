"""VILA-U under every layout: both losses and every gradient of a step are those of one process, to float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import pytest

from tests.families.steps import Outcome, Weights, furthest, one_step, weights_of
from tests.families.vila_u import PP2_UNEVEN, PP2_VPP2
from tests.families.vila_u_steps import CONTENTS, Mutation, Run, undo
from tests.layouts import CP2, DP2, ONE, PP2, PP4, TP2, TP2_PP2, TP2_SP, TP2_SP_CP2, Layout, layout
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

TP4 = layout("TP4", 4, tp=4)
LAYOUTS = (TP2, TP2_SP, TP4, PP2, PP4, PP2_VPP2, PP2_UNEVEN, CP2, TP2_PP2, TP2_SP_CP2, DP2)
# Each layout once, and each kind of step with some.
FAST = {
    (TP2, "mixed"),
    (TP2_SP, "mixed"),
    (TP4, "lone"),
    (PP2, "text"),
    (PP4, "mixed"),
    (PP2_VPP2, "read"),
    (PP2_UNEVEN, "wordless"),
    (CP2, "lone"),
    (TP2_PP2, "mixed"),
    (TP2_SP_CP2, "mixed"),
    (DP2, "lone"),
}


@pytest.fixture(scope="module")
def weights(ranks: RankPool) -> Weights:
    found: Weights = ranks.run(1, weights_of, Run())[0]
    return found


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, weights: Weights) -> Callable[[Run], Outcome]:
    return cache(lambda run: ranks.run(1, one_step, run, ONE.parallel, weights)[0])


def test_each_kind_of_step_trains_what_it_should(one_process: Callable[[Run], Outcome]) -> None:
    for content in CONTENTS:
        found = one_process(Run(content))
        norms = {name: float(gradient.norm()) for name, gradient in found.gradients.items()}
        head = max(norm for name, norm in norms.items() if "rqtransformer" in name)
        drawn = any(kind in ("drawn", "silent", "video") for kind in CONTENTS[content])
        assert (head > 0, found.losses["visual loss"] > 0) == (drawn, drawn), content
        assert (norms["lm_head.weight"] > 0, found.loss > 0) == (content != "wordless",) * 2, content
        assert (norms["mm_projector.layers.0.weight"] > 0) == (content != "text"), content
        assert not [name for name in norms if "codebook" in name], "the codebook is frozen"


@pytest.mark.parametrize(
    ("layout", "content"),
    [
        pytest.param(
            layout,
            content,
            id=f"{layout.name}-{content}",
            marks=() if (layout, content) in FAST else pytest.mark.slow,
        )
        for layout, content in product(LAYOUTS, CONTENTS)
    ],
)
def test_the_layout_changes_nothing(
    ranks: RankPool,
    weights: Weights,
    one_process: Callable[[Run], Outcome],
    layout: Layout,
    content: str,
) -> None:
    expected = one_process(Run(content))
    found = ranks.run(layout.world_size, one_step, Run(content), layout.parallel, weights)[-1]
    assert found.losses == pytest.approx(expected.losses, abs=5e-6)  # the cross entropy is float32
    error, name = furthest(found, expected)
    assert error < 1e-6, name


@pytest.mark.parametrize(
    ("mutation", "layout"),
    [("targets", ONE), ("sees itself", ONE), ("not summed", ONE), ("own count", DP2)],
)
def test_a_mistake_is_noticed(
    ranks: RankPool,
    weights: Weights,
    one_process: Callable[[Run], Outcome],
    mutation: Mutation,
    layout: Layout,
) -> None:
    expected = one_process(Run())
    try:
        found = ranks.run(layout.world_size, one_step, Run(mutation=mutation), layout.parallel, weights)[-1]
    finally:
        ranks.run(layout.world_size, undo)
    assert abs(found.losses["visual loss"] - expected.losses["visual loss"]) > 1e-3
    assert furthest(found, expected)[0] > 1e-3
