"""Dropout of the depth transformer: the same zeros on all tensor-parallel ranks, and in a resumed run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eve.config import ParallelConfig, RunConfig
from tests.families.suite import loading_from, run, saving_in, with_weights
from tests.families.vila_u import run_config
from tests.layouts import ONE, TP2
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed


def with_dropout(parallel: ParallelConfig, chunk: int | None, iterations: int = 4) -> RunConfig:
    config = run_config(parallel, iterations)
    return replace(config, vision=replace(config.vision, depth_dropout=0.5, visual_loss_chunk=chunk))


@pytest.mark.parametrize("chunk", [None, pytest.param(16, marks=pytest.mark.slow)])
def test_tensor_parallel_ranks_drop_the_same(ranks: RankPool, tmp_path: Path, chunk: int | None) -> None:
    alone = ranks.run(1, run, with_weights(with_dropout(ONE.parallel, chunk), ranks, tmp_path))[-1]
    shared = ranks.run(2, run, with_weights(with_dropout(TP2.parallel, chunk), ranks, tmp_path))[-1]
    without = ranks.run(1, run, with_weights(run_config(ONE.parallel, 4), ranks, tmp_path))[-1]
    for name, losses in alone.values.items():
        assert shared.values[name] == pytest.approx(losses, abs=1e-5, rel=0), name
    assert abs(alone.values["visual loss"][0] - without.values["visual loss"][0]) > 1e-4


def test_a_resumed_run_drops_what_it_would_have(ranks: RankPool, tmp_path: Path) -> None:
    whole = ranks.run(1, run, with_dropout(ONE.parallel, 16))[-1]
    first = ranks.run(1, run, saving_in(with_dropout(ONE.parallel, 16), tmp_path), 2, True)[-1]
    second = ranks.run(1, run, loading_from(with_dropout(ONE.parallel, 16), tmp_path))[-1]
    for name, losses in whole.hexadecimal().items():
        assert first.hexadecimal()[name] + second.hexadecimal()[name] == losses, name
