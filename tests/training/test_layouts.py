"""EVE under parallel layouts: what the shared tests of families do not ask (`tests/families/test_shared.py`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.config import ModelConfig, RunConfig
from tests.families.eve import run_config
from tests.families.suite import Trace, loading_from, run, saving_in
from tests.layouts import (
    DP2,
    ONE,
    PP2,
    PP2_UNEVEN,
    PP2_VPP2,
    PP2_VPP2_UNEVEN,
    PP2_VPP3_EMPTY,
    PP4_ENDS,
    PP4_UNEVEN,
    TP2_PP2,
    TP2_SP,
    TP2_SP_CP2,
    Layout,
    parametrize,
)
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def single_device(ranks: RankPool) -> Trace:
    return ranks.run(1, run, run_config(ONE.parallel))[-1]


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective"},
        {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp")},
    ],
    ids=["full", "selective", "modules"],
)
def test_recomputation_changes_nothing(
    ranks: RankPool, single_device: Trace, recompute: dict[str, Any]
) -> None:
    trace = ranks.run(2, run, run_config(TP2_SP.parallel, **recompute), 4)[-1]
    assert trace.losses == pytest.approx(single_device.losses[:4], abs=1e-5, rel=0)


def test_overlap_changes_nothing(ranks: RankPool, tmp_path: Path, single_device: Trace) -> None:
    """Overlapped reduction and gathering, several packs a step, a save and a resume between."""
    parallel = replace(DP2.parallel, overlap_grad_reduce=True, overlap_param_gather=True)
    config = run_config(parallel)
    first = ranks.run(2, run, saving_in(config, tmp_path), 4, True)[-1]
    second = ranks.run(2, run, loading_from(config, tmp_path), 6)[-1]
    assert first.losses + second.losses == pytest.approx(single_device.losses[:6], abs=1e-5, rel=0)


def test_bf16_follows_float32(ranks: RankPool, single_device: Trace) -> None:
    trace = ranks.run(2, run, run_config(TP2_SP.parallel, bf16=True), 3)[-1]
    assert trace.losses == pytest.approx(single_device.losses[:3], rel=0.01)
    assert trace.losses != single_device.losses[:3]


def test_microbatch_mean_is_the_mean_of_means(ranks: RankPool) -> None:
    """With one pack a rank the published normaliser weighs ranks alike, the global one weighs labels alike."""
    published = ranks.run(2, run, run_config(DP2.parallel, loss_normalization="microbatch"), 2)[-1]
    ours = ranks.run(2, run, run_config(DP2.parallel), 2)[-1]
    assert published.losses != pytest.approx(ours.losses, abs=1e-6, rel=0)
    assert published.losses == pytest.approx(ours.losses, abs=0.2)


@parametrize(TP2_PP2, slow=(DP2, PP2_VPP2, TP2_SP_CP2))
def test_fixed_shapes_follow_the_same_path(ranks: RankPool, single_device: Trace, layout: Layout) -> None:
    config = run_config(replace(layout.parallel, variable_seq_lengths=False))
    trace = ranks.run(layout.world_size, run, config, 5)[-1]
    assert trace.samples == single_device.samples[:5]
    assert trace.losses == pytest.approx(single_device.losses[:5], abs=1e-5, rel=0)
    assert trace.aligning == pytest.approx(single_device.aligning[:5], abs=1e-5, rel=0)


@parametrize(TP2_SP_CP2, slow=(TP2_PP2,))
def test_divided_positions(ranks: RankPool, single_device: Trace, layout: Layout) -> None:
    """Scaled rotary embeddings are the same on every rank, also where context parallelism cuts a sample."""
    config = replace(run_config(ONE.parallel), model=ModelConfig(rotary_seq_len_interpolation_factor=2.0))
    expected = ranks.run(1, run, config, 2)[-1]
    trace = ranks.run(layout.world_size, run, replace(config, parallel=layout.parallel), 2)[-1]
    assert trace.losses == pytest.approx(expected.losses, abs=1e-5, rel=0)
    assert expected.losses != pytest.approx(single_device.losses[:2], abs=1e-3, rel=0)


@parametrize(PP2_VPP2_UNEVEN, PP4_ENDS, slow=(PP2_VPP3_EMPTY,))
def test_uneven_chunks(ranks: RankPool, single_device: Trace, layout: Layout) -> None:
    """Also without a layer, and with shapes that are known from the layout alone."""
    config = run_config(replace(layout.parallel, variable_seq_lengths=False))
    trace = ranks.run(layout.world_size, run, config, 4)[-1]
    assert trace.losses == pytest.approx(single_device.losses[:4], abs=1e-5, rel=0)
    assert trace.aligning == pytest.approx(single_device.aligning[:4], abs=1e-5, rel=0)


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        (PP2_VPP2_UNEVEN, PP4_UNEVEN),
        pytest.param(PP4_UNEVEN, PP2_UNEVEN, marks=pytest.mark.slow),
        pytest.param(PP4_ENDS, PP2_VPP3_EMPTY, marks=pytest.mark.slow),
        pytest.param(PP2_VPP3_EMPTY, ONE, marks=pytest.mark.slow),
    ],
    ids=lambda layout: layout.name,
)
def test_resume_from_an_uneven_split(
    ranks: RankPool, tmp_path: Path, single_device: Trace, saved: Layout, resumed: Layout
) -> None:
    config = run_config(saved.parallel)
    ranks.run(saved.world_size, run, saving_in(config, tmp_path), 2, True)
    config = loading_from(run_config(resumed.parallel), tmp_path)
    trace = ranks.run(resumed.world_size, run, config, 4)[-1]
    assert trace.losses == pytest.approx(single_device.losses[2:4], abs=1e-5, rel=0)
    assert trace.aligning == pytest.approx(single_device.aligning[2:4], abs=1e-5, rel=0)


def test_frozen_decoder(ranks: RankPool, single_device: Trace) -> None:
    """Stage 1 trains the vision side alone: the first loss is the same, later ones are not; nothing hangs."""
    traces = [
        ranks.run(some.world_size, run, run_config(some.parallel, stage=1), 5)[-1] for some in (ONE, TP2_PP2)
    ]
    assert traces[0].losses == pytest.approx(traces[1].losses, abs=1e-5, rel=0)
    assert traces[0].losses[0] == pytest.approx(single_device.losses[0], abs=1e-6)
    assert traces[0].losses[4] != pytest.approx(single_device.losses[4], abs=1e-6)


@dataclass
class Moved:
    """What two steps of stage 1 moved, held and reduced on a rank."""

    trained: dict[str, int]
    changed: set[str]
    expected: Any
    gradient_elements: int
    moment_elements: int
    allocated: int


def two_steps(config: RunConfig) -> Moved:
    """Runs on each rank."""
    import torch

    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import setup, train_one
    from megatron_eve.training.monitoring.memory import training_bytes

    with model_parallel(config):
        trainer = setup(config)
        before = {n: p.detach().clone() for c in trainer.chunks for n, p in c.named_parameters()}
        expected = training_bytes(trainer.chunks, trainer.optimizer, bf16=False)
        train_one(trainer)
        train_one(trainer)
        trainer.loader.close()
        named = {n: p for c in trainer.chunks for n, p in c.named_parameters()}
        optimizers = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
        moments = [
            state[name]
            for some in optimizers
            for state in some.optimizer.state.values()
            for name in ("exp_avg", "exp_avg_sq")
        ]
        return Moved(
            trained={n.removeprefix("module."): p.numel() for n, p in named.items() if p.requires_grad},
            changed={n.removeprefix("module.") for n, p in named.items() if not torch.equal(p, before[n])},
            expected=expected,
            gradient_elements=sum(b.grad_data.numel() for c in trainer.chunks for b in c.buffers),
            moment_elements=sum(moment.numel() for moment in moments),
            allocated=sum(moment.nbytes for moment in moments),
        )


def test_stage_1_spends_nothing_on_the_frozen_decoder(ranks: RankPool) -> None:
    """No gradient buffer (so no reduction), no optimizer state, no movement: in names, elements and bytes."""
    from megatron_eve.models.eve.parameters import ALIGNING_LAYER, PARTS
    from megatron_eve.models.family import matches

    frozen = ranks.run(1, two_steps, run_config(ONE.parallel, stage=1))[0]
    assert frozen.changed == set(frozen.trained)
    assert all(
        name.startswith("vision_model.") or matches(name, PARTS[ALIGNING_LAYER]) for name in frozen.changed
    )
    assert len(frozen.trained) == 23 + 13
    elements = sum(frozen.trained.values())
    # megatron-core rounds each parameter's place in a distributed optimizer's buffer up to 64 elements.
    assert elements <= frozen.gradient_elements <= elements + 64 * len(frozen.trained) + 256
    assert frozen.moment_elements == 2 * elements
    assert frozen.expected.gradients == 4 * frozen.gradient_elements
    assert frozen.expected.optimizer == frozen.allocated
    whole = ranks.run(1, two_steps, run_config(ONE.parallel))[0]
    decoder = sum(whole.trained.values()) - elements
    assert decoder > 5 * elements
    assert whole.moment_elements - frozen.moment_elements == 2 * decoder


def test_stage_1_on_two_stages(ranks: RankPool) -> None:
    """Each pipeline stage holds state for its own projections alone, sharded over data-parallel ranks if any."""
    first, last = ranks.run(2, two_steps, run_config(PP2.parallel, stage=1))
    assert {name.split(".")[0] for name in first.trained} == {"vision_model", "input_tap", "decoder"}
    assert {name.split(".")[0] for name in last.trained} == {"aligning_layer"}
    for moved in (first, last):
        assert moved.changed == set(moved.trained)
        assert moved.moment_elements == 2 * sum(moved.trained.values())
    halves = ranks.run(2, two_steps, run_config(DP2.parallel, stage=1))
    both = sum(first.trained.values()) + sum(last.trained.values())
    assert sum(half.moment_elements for half in halves) == 2 * both


def rates(config: RunConfig) -> dict[float, int]:
    """Runs on each rank: weights that train at each peak rate, after setup (and a resume, if there is one)."""
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import setup

    with model_parallel(config):
        trainer = setup(config)
        trainer.loader.close()
        found: dict[float, int] = {}
        for group in trainer.optimizer.param_groups:
            weights = sum(p.numel() for p in group["params"])
            found[group["max_lr"]] = found.get(group["max_lr"], 0) + weights
        return found


@pytest.mark.parametrize(
    "distributed", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["distributed", "plain"]
)
def test_rates_by_name_survive_a_resume(ranks: RankPool, tmp_path: Path, distributed: bool) -> None:
    """Overrides name layers over all stages, 0 is a rate, and a checkpoint does not mix the groups up."""
    config = run_config(replace(PP2.parallel, use_distributed_optimizer=distributed), iterations=6)
    overrides = {"vision_model.*": 0.0, "decoder.layers.5.*": 4e-4}
    config = replace(config, optimizer=replace(config.optimizer, lr_overrides=overrides))
    first, last = ranks.run(2, rates, config)
    assert first[0.0] > 0 and first.get(4e-4, 0) == 0  # layer 5 of 8 lies on the last stage
    assert last[4e-4] > 0 and last.get(0.0, 0) == 0
    whole = ranks.run(2, run, config)[-1]
    ranks.run(2, run, saving_in(config, tmp_path), 3, True)
    resumed = loading_from(config, tmp_path)
    assert ranks.run(2, rates, resumed) == [first, last]
    losses = ranks.run(2, run, resumed)[-1].losses
    assert [loss.hex() for loss in losses] == [loss.hex() for loss in whole.losses[3:]]


def test_the_shortest_runs(ranks: RankPool) -> None:
    """One iteration; and a last step that is short, in a run whose warm-up would be as long."""
    assert len(ranks.run(1, run, run_config(ONE.parallel, iterations=1))[-1].losses) == 1
    config = run_config(ONE.parallel)
    config = replace(config, training=replace(config.training, train_iters=None, train_samples=5))
    assert len(ranks.run(1, run, config)[-1].losses) == 1


def run_with_rot(config: RunConfig, rot: bytes) -> tuple[Trace, dict[int, str]]:
    """Runs on each rank: every 50th image's bytes are `rot`; what the run went through and what it missed."""
    from megatron_eve.data.mock import MockDataset
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import report_damaged, setup, train_one

    original = MockDataset.image_bytes
    MockDataset.image_bytes = lambda self, image: original(self, image) if image % 50 else rot  # type: ignore[method-assign]
    trace = Trace()
    try:
        with model_parallel(config):
            trainer = setup(config)
            while trainer.train_state.iteration < config.total_iterations:
                for name, loss in train_one(trainer).losses.items():
                    trace.values.setdefault(name, []).append(float(loss))
            trainer.loader.close()
            report_damaged(trainer)
            return trace, trainer.loader.damaged
    finally:
        MockDataset.image_bytes = original  # type: ignore[method-assign]


def test_images_that_rot_cost_only_themselves(ranks: RankPool) -> None:
    """One in fifty, in a pipeline whose two ends decode the same records: as if those pictures were grey."""
    from io import BytesIO

    from PIL import Image

    config = run_config(PP2.parallel, iterations=12)
    grey = BytesIO()
    Image.new("RGB", (160, 120), (122, 116, 104)).save(grey, "PNG")
    (_, at_first), (last, at_last) = ranks.run(2, run_with_rot, config, b"rot")
    assert at_first and at_first == at_last and all(image % 50 == 0 for image in at_first)
    assert set(at_first) == set(at_last) and "not JPEG" in next(iter(at_first.values()))
    _, (expected, nothing) = ranks.run(2, run_with_rot, config, grey.getvalue())
    assert nothing == {}
    assert last == expected
