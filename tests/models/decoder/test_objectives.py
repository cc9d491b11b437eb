"""Objectives of a family that have no intermediate features, one of them without weights, rows or targets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_eve.config import DataConfig, OptimizerConfig, RunConfig, TrainingConfig
from megatron_eve.models.registry import find_family
from tests.families.toy.config import ToyConfig
from tests.models.decoder.test_model import MODEL
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

FAMILY = "tests.models.decoder.norm_family"


def steps(config: RunConfig, count: int) -> tuple[list[dict[str, float]], list[str], list[str]]:
    """Runs on each rank: losses of steps, keys of a checkpoint, and parameters."""
    from megatron_eve.checkpoint.state import CONTENT
    from megatron_eve.models.build import unwrap
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import setup, train_one

    with model_parallel(config):
        trainer = setup(config)
        losses = [train_one(trainer).losses for _ in range(count)]
        chunk = unwrap(trainer.chunks[0])
        keys = list(chunk.sharded_state_dict(metadata=dict(CONTENT)))
        names = [name for name, _ in chunk.named_parameters()]
        trainer.loader.close()
    return losses, keys, names


def test_a_run_trains_what_its_family_adds(ranks: RankPool) -> None:
    config = RunConfig(
        family=FAMILY,
        model=MODEL,
        vision=ToyConfig(),
        training=TrainingConfig(stage=2, global_batch_size=4, train_iters=6, transformer_impl="local"),
        optimizer=OptimizerConfig(lr=3e-3, lr_warmup_fraction=0.0),
        data=DataConfig(mock_data=True, seq_length=1024),
    )
    assert find_family(FAMILY).name == FAMILY
    losses, keys, names = ranks.run(1, steps, config, 6)[0]
    assert list(losses[0]) == ["lm loss", "colour loss", "norm"]
    assert losses[-1]["colour loss"] < losses[0]["colour loss"]
    assert "colour_head.projection.weight" in keys and set(names) <= set(keys)
    # The decoder is trained by them too: its language loss goes another way than alone.
    alone, _, _ = ranks.run(1, steps, replace(config, vision=ToyConfig(colour_loss_weight=0.0)), 2)[0]
    assert list(alone[0]) == ["lm loss"]
    assert alone[0]["lm loss"] == losses[0]["lm loss"] and alone[1]["lm loss"] != losses[1]["lm loss"]
