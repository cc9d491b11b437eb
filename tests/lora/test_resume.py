"""A run with adapters that is resumed: bit for bit under its layout, and under another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.families.suite import loading_from, run, saving_in
from tests.layouts import DP2, ONE, PP2, TP2, TP2_PP2, TP2_SP, Layout, layout, parametrize
from tests.lora.runs import LORA, learn, lora_config, starting_from
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

DROPPING = replace(LORA, lora_dropout=0.25)
PP2_VPP2 = layout("PP2xVPP2", 2, pp=2, num_layers_per_virtual_pipeline_stage=1)


@parametrize(DP2, slow=(TP2_SP, PP2_VPP2, TP2_PP2))
def test_resume_with_dropout_is_bit_exact(ranks: RankPool, tmp_path: Path, layout: Layout) -> None:
    """The ranks of DP 2 draw different numbers of zeros, since their packs differ in length."""
    config = lora_config(layout.parallel, 5, DROPPING)
    whole = ranks.run(layout.world_size, run, config)[-1]
    first = ranks.run(layout.world_size, run, saving_in(config, tmp_path), 3, True)[-1]
    second = ranks.run(layout.world_size, run, loading_from(config, tmp_path))[-1]
    losses = [trace.hexadecimal()["lm loss"] for trace in (first, second, whole)]
    assert losses[0] + losses[1] == losses[2]


@parametrize(TP2_PP2, slow=(TP2, PP2_VPP2))
@pytest.mark.slow
def test_resume_under_another_layout(ranks: RankPool, tmp_path: Path, layout: Layout) -> None:
    config = lora_config(layout.parallel, 4)
    ranks.run(layout.world_size, run, saving_in(config, tmp_path), 2, True)
    expected = ranks.run(layout.world_size, run, loading_from(config, tmp_path))[-1]
    for other in (ONE, TP2_SP, PP2):
        trace = ranks.run(other.world_size, run, loading_from(lora_config(other.parallel, 4), tmp_path))[-1]
        assert trace.losses == pytest.approx(expected.losses, abs=1e-5, rel=0), other.name


def test_adapters_begin_anew_on_weights_without(ranks: RankPool, tmp_path: Path) -> None:
    """The first loss is that of the weights themselves, since B is 0; then adapters and front end move, and no more."""
    bare = replace(lora_config(), lora=type(LORA)())
    ranks.run(1, run, saving_in(bare, tmp_path), 1, True)
    plain = ranks.run(1, learn, starting_from(bare, tmp_path))[-1]
    found = ranks.run(1, learn, starting_from(lora_config(), tmp_path))[-1]
    assert float.fromhex(found.losses[0]) == pytest.approx(float.fromhex(plain.losses[0]), abs=1e-6)
    own = {name for name in found.parameters if ".lora_" not in name}
    assert own and all("vision" in name or "projector" in name for name in own)
    assert "lm_head.weight" in plain.parameters
    for name in own:
        assert bool((found.parameters[name] != plain.parameters[name]).any()), name
