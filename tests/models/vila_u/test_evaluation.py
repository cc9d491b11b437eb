"""Losses of a VILA-U on held-out samples: that of the codes also depth by depth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eve.config import RunConfig
from tests.families.suite import with_weights
from tests.families.vila_u import run_config
from tests.layouts import ONE, PP2, TP2_SP
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed


def held_out(config: RunConfig) -> dict[str, float]:
    """Runs on each rank: a step, then the losses."""
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.evaluation import evaluate
    from megatron_eve.training.loop.train import setup, train_one

    with model_parallel(config):
        trainer = setup(config)
        train_one(trainer)
        found = evaluate(config, trainer.chunks, trainer.loader, trainer.data.held_out)["mock"]
        trainer.loader.close()
    return found


def test_the_visual_loss_is_the_mean_of_its_depths(ranks: RankPool, tmp_path: Path) -> None:
    single = None
    for layout in (ONE, TP2_SP, PP2):
        config = with_weights(run_config(layout.parallel, iterations=1), ranks, tmp_path)
        training = replace(config.training, eval_interval=1, eval_iters=2)
        config = replace(config, training=training, data=replace(config.data, split="995,5"))
        losses = ranks.run(layout.world_size, held_out, config)[-1]
        depths = [f"visual loss depth {depth}" for depth in range(1, 5)]
        assert list(losses) == ["lm loss", "visual loss", *depths]
        assert sum(losses[name] for name in depths) / 4 == pytest.approx(losses["visual loss"], rel=1e-6)
        assert len({losses[name] for name in depths}) == 4
        single = single or losses
        assert losses == pytest.approx(single, abs=1e-5, rel=0)
