"""VILA under every layout: the loss and every gradient of a step are those of one process, to float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product

import pytest

from tests.families.steps import Outcome, Weights, furthest, one_step, weights_of
from tests.families.vila import PP2_UNEVEN, PP2_VPP2, run_config
from tests.families.vila_steps import CONTENTS, LORA, Run
from tests.layouts import (
    CP2,
    DP2,
    ONE,
    PP2,
    PP4,
    TP2,
    TP2_PP2,
    TP2_SP,
    TP2_SP_CP2,
    Layout,
    layout,
    parametrize,
)
from tests.lora.test_counts import held
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

TP4 = layout("TP4", 4, tp=4)
LAYOUTS = (TP2, TP2_SP, TP4, PP2, PP4, PP2_VPP2, PP2_UNEVEN, CP2, TP2_PP2, TP2_SP_CP2, DP2)
RUNS = tuple(
    Run(content, trained, lora) for content, trained, lora in product(CONTENTS, (True, False), (False, True))
)
# Each layout once, and each kind of run with some.
FAST = {
    (TP2, Run("lone")),
    (TP2_SP, Run("mixed", lora=True)),
    (TP4, Run("mixed")),
    (PP2, Run("text", trained=False)),
    (PP4, Run("mixed", trained=False)),
    (PP2_VPP2, Run("text")),
    (PP2_UNEVEN, Run("lone", trained=False, lora=True)),
    (CP2, Run("lone")),
    (TP2_PP2, Run("mixed")),
    (TP2_SP_CP2, Run("mixed")),
    (DP2, Run("lone")),
    (TP2_SP, Run("tiles")),
}


@pytest.fixture(scope="module")
def weights(ranks: RankPool) -> Callable[[bool], Weights]:
    """Weights of the model without and with adapters."""
    return cache(lambda lora: ranks.run(1, weights_of, Run(lora=lora))[0])


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, weights: Callable[[bool], Weights]) -> Callable[[Run], Outcome]:
    return cache(lambda run: ranks.run(1, one_step, run, ONE.parallel, weights(run.lora))[0])


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
    ranks: RankPool,
    weights: Callable[[bool], Weights],
    one_process: Callable[[Run], Outcome],
    layout: Layout,
    run: Run,
) -> None:
    expected = one_process(run)
    towers = [float(some.norm()) for name, some in expected.gradients.items() if "vision_tower" in name]
    assert bool(towers) == run.trained
    assert not run.trained or (max(towers) > 0.0) == (run.content != "text")
    found = ranks.run(layout.world_size, one_step, run, layout.parallel, weights(run.lora))[-1]
    assert found.loss == pytest.approx(expected.loss, abs=5e-6)  # the cross entropy is float32
    error, name = furthest(found, expected)
    assert error < 1e-6, name


@pytest.mark.parametrize("rope", ["linear", "llama3"])
@parametrize(CP2, slow=(TP2_SP_CP2, PP2_VPP2))
def test_positions_are_scaled_alike_in_every_layout(
    ranks: RankPool,
    weights: Callable[[bool], Weights],
    one_process: Callable[[Run], Outcome],
    layout: Layout,
    rope: str,
) -> None:
    """The angles of a sample that is spread over context-parallel ranks are those of one process, by its positions."""
    run = Run(rope=rope)
    expected = one_process(run)
    found = ranks.run(layout.world_size, one_step, run, layout.parallel, weights(False))[-1]
    assert found.loss == pytest.approx(expected.loss, abs=5e-6)
    error, name = furthest(found, expected)
    assert error < 1e-6, name
    assert furthest(one_process(Run()), expected)[0] > 1e-3, "without scaling it is another model"


@pytest.mark.parametrize("layout", [TP2_SP, TP2_SP_CP2], ids=lambda layout: layout.name)
def test_a_tower_without_its_mark_is_noticed(
    ranks: RankPool,
    weights: Callable[[bool], Weights],
    one_process: Callable[[Run], Outcome],
    layout: Layout,
) -> None:
    """Each tensor-parallel rank would keep the gradient of its own pictures."""
    found = ranks.run(layout.world_size, one_step, Run(unmarked=True), layout.parallel, weights(False))[-1]
    error, name = furthest(found, one_process(Run()))
    assert error > 0.1 and "vision_tower" in name


def test_the_other_order_of_rows_is_noticed(
    ranks: RankPool, weights: Callable[[bool], Weights], one_process: Callable[[Run], Outcome]
) -> None:
    found = ranks.run(1, one_step, Run(row_order=True), ONE.parallel, weights(False))[0]
    assert abs(found.loss - one_process(Run()).loss) > 1e-4


@pytest.mark.parametrize(
    ("trained", "lora"),
    [
        pytest.param(False, False, id="frozen-full"),
        pytest.param(True, True, id="trained-lora"),
        pytest.param(True, False, id="trained-full", marks=pytest.mark.slow),
        pytest.param(False, True, id="frozen-lora", marks=pytest.mark.slow),
    ],
)
def test_a_frozen_tower_takes_no_bytes(ranks: RankPool, trained: bool, lora: bool) -> None:
    """Gradient buffers and moments of AdamW are those of what trains; of the tower, the layers that run."""
    config = run_config(replace(TP2.parallel, use_distributed_optimizer=False), 1)
    config = replace(config, vision=replace(config.vision, freeze_ViT=not trained))
    config = replace(config, lora=LORA) if lora else config
    for one in ranks.run(2, held, config):
        towers = {name for name in one.others if ".tower." in name}
        assert bool(towers) == trained
        assert not [name for name in towers if "layers.3" in name or "post_layernorm" in name]
        assert bool(one.adapters) == lora
        assert not lora or all(name.startswith("vision_model.") for name in one.others)
        elements = one.adapters + sum(one.others.values())
        assert one.gradients == 4 * elements
        assert one.moments == 8 * elements
