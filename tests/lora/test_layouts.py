"""Adapters under parallel layouts: losses, gradients and what they become are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.config import ParallelConfig, RunConfig
from tests.families.suite import run, saving_in
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
from tests.lora.runs import FULL, LORA, Learned, learn, lora_config, starting_from
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

PP2_VPP2_OF_4 = layout("PP2xVPP2", 2, pp=2, num_layers_per_virtual_pipeline_stage=1)


@pytest.fixture(scope="module")
def base(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with adapters, one step behind their beginning, so that B is no longer 0."""
    folder = tmp_path_factory.mktemp("base")
    ranks.run(1, run, saving_in(lora_config(), folder), 1, True)
    return folder


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, base: Path) -> Callable[[RunConfig], Learned]:
    """A run on one process."""
    known: dict[str, Learned] = {}

    def of(config: RunConfig) -> Learned:
        alone = replace(config, parallel=whole_gradients(ONE))
        key = repr(replace(alone.lora)) + repr(alone.training)
        if key not in known:
            known[key] = ranks.run(1, learn, starting_from(alone, base))[-1]
        return known[key]

    return of


def furthest(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest distance between two tensors of a name, relative to the larger of its norm and a small one.

    Gradients of key biases cancel: what is left of them is rounding noise, and is not compared.
    """
    assert set(found) == set(expected)
    assert all(value.isfinite().all() for value in found.values())  # `max` may pass over what is no number
    return max(
        float((found[name] - value).norm() / max(float(value.norm()), 1e-7))
        for name, value in expected.items()
        if not name.endswith(".attn.key.bias")
    )


def whole_gradients(layout: Layout) -> ParallelConfig:
    """The layout with an optimizer that is not distributed, which leaves whole gradients on each rank."""
    return replace(layout.parallel, use_distributed_optimizer=False)


def agree(found: Learned, expected: Learned) -> None:
    losses = [[float.fromhex(loss) for loss in some.losses] for some in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5, rel=0)
    assert furthest(found.gradients, expected.gradients) < 5e-5


@parametrize(
    TP2_SP,
    PP2_VPP2_OF_4,
    TP2_SP_CP2,
    slow=(TP2, PP2, CP2, DP2, PP4, TP2_PP2),
)
def test_a_layout_changes_nothing(
    ranks: RankPool, base: Path, one_process: Callable[[RunConfig], Learned], layout: Layout
) -> None:
    config = starting_from(lora_config(whole_gradients(layout)), base)
    found, expected = ranks.run(layout.world_size, learn, config)[-1], one_process(lora_config())
    assert sum(".lora_A." in name for name in expected.gradients) == 4 * 7
    assert all(bool(value.any()) for name, value in expected.gradients.items() if ".lora_" in name)
    agree(found, expected)


@parametrize(TP2_SP, slow=(TP2, PP2_VPP2_OF_4, CP2))
def test_full_recomputation_changes_nothing(
    ranks: RankPool, base: Path, one_process: Callable[[RunConfig], Learned], layout: Layout
) -> None:
    config = starting_from(lora_config(whole_gradients(layout), 2, **FULL), base)
    found, expected = ranks.run(layout.world_size, learn, config)[-1], one_process(lora_config())
    assert furthest(found.gradients, expected.gradients) < 5e-5


@parametrize(TP2_SP, slow=(TP2,))
@pytest.mark.parametrize("target", [("q_proj", "v_proj", "up_proj"), ("k_proj", "gate_proj", "down_proj")])
def test_some_matrices_alone(
    ranks: RankPool, tmp_path: Path, layout: Layout, target: tuple[str, ...]
) -> None:
    """Adapters of a part of the fused matrices: saved by one process, and gone on with under the layout."""
    lora = replace(LORA, lora_target=target)
    ranks.run(1, run, saving_in(lora_config(lora=lora), tmp_path), 1, True)
    one, some = (
        starting_from(lora_config(whole_gradients(each), 2, lora), tmp_path) for each in (ONE, layout)
    )
    expected = ranks.run(1, learn, one)[-1]
    adapted = {name.split(".")[4] for name in expected.gradients if ".lora_" in name}
    assert adapted == set(target)
    agree(ranks.run(layout.world_size, learn, some)[-1], expected)


def test_without_the_mark_of_sequence_parallelism_it_shows(
    ranks: RankPool, base: Path, one_process: Callable[[RunConfig], Learned]
) -> None:
    config = starting_from(lora_config(whole_gradients(TP2_SP), 1), base)
    found, expected = ranks.run(2, learn, config, True)[-1], one_process(lora_config())
    wrong = {
        name.split(".", 3)[3]
        for name, value in expected.gradients.items()
        if ".lora_" in name and furthest({name: found.gradients[name]}, {name: value}) > 0.01
    }
    assert wrong == {
        *(f"self_attn.{name}_proj.lora_A.weight" for name in "qkv"),
        *(f"mlp.{name}_proj.lora_A.weight" for name in ("gate", "up")),
        "self_attn.o_proj.lora_B.weight",
        "mlp.down_proj.lora_B.weight",
    }
