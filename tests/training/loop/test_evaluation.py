"""Losses on held-out samples: the same under every layout and batch size, and without a trace in the run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import pytest

from megatron_eve.config import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_eve.models.eve.config import EVEConfig
from tests.golden_dir import find_golden
from tests.layouts import ONE, PP2_VPP2, TP2_DP2, TP2_SP_CP2, Layout, layout, parametrize
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

TEACHER = "_shared/openai/clip-mini-patch14-112"
DP2_OVERLAP = layout("DP2+overlap", 2, overlap_grad_reduce=True, overlap_param_gather=True)
PP2_DP2_OVERLAP = layout("PP2xDP2+overlap", 4, pp=2, overlap_grad_reduce=True, overlap_param_gather=True)
STEPS = 3
HELD_OUT = 20  # of 4096 mock samples, at --split 995,5


def run_config(parallel: ParallelConfig, **training: Any) -> RunConfig:
    sizes = {"global_batch_size": 8, "train_iters": STEPS, "eval_interval": 1}
    return RunConfig(
        parallel=parallel,
        training=TrainingConfig(**{**sizes, **training}),
        vision=EVEConfig(patch_aligning=True, teacher_model=str(find_golden(TEACHER))),
        optimizer=OptimizerConfig(lr=4e-5, lr_warmup_fraction=0.1),
        data=DataConfig(mock_data=True, seq_length=512, split="995,5"),
        checkpoint=CheckpointConfig(pretrained_checkpoint=str(find_golden("_shared/hf_mini224"))),
    )


@dataclass
class Trace:
    """What a run went through, on the last rank: bits of the training losses, held-out losses, what was measured on."""

    training: list[list[str]]
    held_out: list[dict[str, float]]
    measured: list[list[int]]


def run(config: RunConfig, evaluates: bool = True) -> Trace:
    """Runs on each rank: train, and after each step measure the held-out losses, or not."""
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.evaluation import evaluate
    from megatron_eve.training.loop.train import setup, train_one

    trace = Trace([], [], [])
    with model_parallel(config):
        trainer = setup(config)
        step_of = trainer.loader.step_of

        def noted(samples: Any) -> Any:
            trace.measured.append(samples.tolist())
            return step_of(samples)

        trainer.loader.step_of = noted  # type: ignore[method-assign]
        for _ in range(config.total_iterations):
            losses = train_one(trainer).losses
            trace.training.append([float(loss).hex() for loss in losses.values()])
            if evaluates:
                found = evaluate(
                    config, trainer.chunks, trainer.loader, trainer.data.held_out, trainer.target_models
                )
                assert list(found) == ["mock"]
                trace.held_out.append(found["mock"])
        trainer.loader.close()
    return trace


@pytest.fixture(scope="module")
def single_device(ranks: RankPool) -> Trace:
    return ranks.run(1, run, run_config(ONE.parallel))[-1]


def assert_near(found: Trace, expected: Trace) -> None:
    for ours, theirs in zip(found.held_out, expected.held_out, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=0)


def test_all_held_out_samples_each_time_and_none_of_the_runs(single_device: Trace) -> None:
    assert [len(batch) for batch in single_device.measured] == [8, 8, 4] * STEPS
    evaluations = [[*chain(*single_device.measured[i : i + 3])] for i in range(0, 3 * STEPS, 3)]
    assert len(set(evaluations[0])) == HELD_OUT
    assert evaluations[1:] == evaluations[:-1]
    assert set(single_device.held_out[0]) == {"lm loss", "align loss"}
    losses = [found["lm loss"] for found in single_device.held_out]
    assert losses == sorted(losses, reverse=True)  # it learns what carries over: which ids come at all
    assert losses[-1] < losses[0]


@parametrize(TP2_SP_CP2, slow=(TP2_DP2, PP2_VPP2))
def test_the_layout_does_not_move_them(ranks: RankPool, single_device: Trace, layout: Layout) -> None:
    found = ranks.run(layout.world_size, run, run_config(layout.parallel))[-1]
    assert found.measured == single_device.measured
    assert_near(found, single_device)


def test_means_do_not_depend_on_the_batches(ranks: RankPool) -> None:
    """The frozen-rate run measures the same weights with batches of 8, of 20 and of 7."""
    found = []
    for batch in (8, 20, 7):
        config = run_config(ONE.parallel, global_batch_size=batch, train_iters=1)
        config = replace(config, optimizer=OptimizerConfig(lr=0.0, min_lr=0.0))
        found.append(ranks.run(1, run, config)[-1])
    assert_near(found[1], found[0])
    assert_near(found[2], found[0])


def test_fewer_batches_are_the_first_ones(ranks: RankPool, single_device: Trace) -> None:
    found = ranks.run(1, run, run_config(ONE.parallel, eval_iters=2, train_iters=1))[-1]
    assert found.measured == single_device.measured[:2]


@parametrize(PP2_DP2_OVERLAP, slow=(ONE, PP2_VPP2, DP2_OVERLAP))
def test_the_run_is_the_same_bit_for_bit(ranks: RankPool, layout: Layout) -> None:
    """Also where parameters are gathered while the next forward pass runs."""
    config = run_config(layout.parallel)
    assert ranks.run(layout.world_size, run, config)[-1].training == (
        ranks.run(layout.world_size, run, config, False)[-1].training
    )


def test_gathered_parameters_are_those_that_are_measured(ranks: RankPool, single_device: Trace) -> None:
    assert_near(ranks.run(2, run, run_config(DP2_OVERLAP.parallel))[-1], single_device)
