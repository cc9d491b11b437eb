"""VILA's share of the first pipeline stage, against the arithmetic of its design; its memory against its modules."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from megatron_eve.config import PRESETS, ParallelConfig, RunConfig, TrainingConfig, parse
from megatron_eve.config.memory import rank_memory
from megatron_eve.models.model_parts import Work
from megatron_eve.models.registry import find_family
from megatron_eve.models.vila.config import ProjectorType
from megatron_eve.models.vila.flops import tower_flops
from megatron_eve.models.vila.parameters import tower_parameters
from megatron_eve.training.loop.data import open_data
from megatron_eve.training.monitoring.balance import (
    EndCosts,
    best_split,
    describe_balance,
    end_costs,
    even_layers,
)
from tests.families.suite import run, with_weights
from tests.layouts import Layout, layout
from tests.ranks import RankPool

VILA_7B, VILA_8B = PRESETS["vila_7b"], PRESETS["vila15_8b"]
# VILA-1.5-3B: Sheared LLaMA behind the same tower.
SHEARED = replace(VILA_7B.model, hidden_size=2560, ffn_hidden_size=6912, num_attention_heads=20)
VILA_3B = VILA_8B._replace(model=SHEARED)


def run_of(sizes: Any, frozen: bool, stages: int = 4) -> RunConfig:
    return RunConfig(
        family="vila",
        model=sizes.model,
        vision=replace(sizes.vision, freeze_ViT=frozen),
        parallel=ParallelConfig(pipeline_model_parallel_size=stages),
        training=TrainingConfig(stage=3),
    )


def sample(images: int, rows: int, text: int) -> Work:
    """One sample, of which all text is predicted."""
    tokens = images * rows + text
    return Work(tokens, tokens * (tokens + 1) // 2, text, images, images * rows, images * rows)


@pytest.mark.parametrize(
    ("sizes", "work", "frozen", "share", "layers"),
    [
        (VILA_7B, sample(4, 576, 490), True, 0.0125, 7.7),
        (VILA_8B, sample(4, 196, 490), True, 0.047, 6.9),
        (VILA_8B, sample(4, 196, 490), False, 0.141, 4.6),
        (VILA_8B, sample(1, 196, 200), True, 0.038, 7.1),
        (VILA_8B, sample(1, 196, 200), False, 0.115, 5.2),
        (VILA_3B, sample(1, 196, 200), True, 0.105, 5.5),
        (VILA_3B, sample(1, 196, 200), False, 0.315, 0.4),
    ],
)  # fmt: skip
def test_the_even_first_stage(sizes: Any, work: Work, frozen: bool, share: float, layers: float) -> None:
    """Of 32 layers at PP 4 for the tower alone, with the output layer left out; the projector takes a little more."""
    config = run_of(sizes, frozen)
    costs = end_costs(config, work)
    tower = find_family("vila").flops(config, work).front_end["tower"]
    assert tower == work.images * tower_flops(config.vision)
    alone = costs.first * tower / sum(find_family("vila").flops(config, work).front_end.values())
    assert alone / 32 == pytest.approx(share, abs=0.0005)
    assert even_layers(32, 4, EndCosts(alone, 0))[0] == pytest.approx(layers, abs=0.05)
    both = even_layers(32, 4, EndCosts(costs.first, 0))[0]
    assert layers - 0.15 < both < layers


def test_the_proposal_counts_the_output_layer() -> None:
    work = sample(4, 196, 490)
    frozen, trained = (end_costs(run_of(VILA_8B, freeze), work) for freeze in (True, False))
    # 490 of 1274 rows go to 128256 logits, 4096 x 128256 values beside the 218e6 of a layer: 0.385 * 2.41 = 0.93, and
    # 0.905 with the layer's attention.
    assert frozen.last == trained.last == pytest.approx(0.905, abs=0.002)
    assert best_split(32, 4, 1, frozen) == (7, 9, 8, 8)
    assert best_split(32, 4, 1, trained) == (5, 9, 9, 9)


FLAGS = ["--preset", "vila_tiny", "--mock-data", "--seq-length", "512", "--train-iters", "4"]


def test_what_a_run_prints() -> None:
    config = parse(
        [*FLAGS, "--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "Et*3|t,L"]
    )
    lines = (describe_balance(config, open_data(config)) or "").split("\n")
    assert "the front end costs 0.1 decoder layers on the first stage" in lines[0]
    assert lines[1].endswith("with --pipeline-model-parallel-layout 'Et*2|t*2,L'")


def held_and_trained(configs: Sequence[RunConfig]) -> list[tuple[int, int]]:
    """Runs on each rank: parameters of the front ends, and those of them that train."""
    from megatron_eve.models.build import transformer_config
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.models.stages import stage_of

    found = []
    with model_parallel(configs[0]):
        for config in configs:
            module: Any = find_family(config.family).front_end(config, transformer_config(config))
            named = [(f"vision_model.{name}", p) for name, p in module.named_parameters()]
            trained = [p for name, p in named if p.requires_grad and stage_of(config).trains(name)]
            found.append((sum(p.numel() for _, p in named), sum(p.numel() for p in trained)))
    return found


@pytest.mark.parametrize("ranks_of_tensor", [1, 2])
@pytest.mark.distributed
def test_every_parameter_is_counted(ranks: RankPool, ranks_of_tensor: int) -> None:
    """On each tensor-parallel rank: the tower whole, matrices of the projector in shares."""
    configs = []
    for kind, tower, frozen in itertools.product(get_args(ProjectorType), ("clip", "siglip"), (True, False)):
        vision = replace(
            PRESETS["vila_tiny"].vision, projector_type=kind, vision_model_type=tower, freeze_ViT=frozen
        )
        parallel = ParallelConfig(tensor_model_parallel_size=ranks_of_tensor)
        configs.append(
            RunConfig(family="vila", model=PRESETS["vila_tiny"].model, vision=vision, parallel=parallel)
        )
    counted = [find_family("vila").parameter_counts(config) for config in configs]
    expected = [(count.first_stage, count.first_stage - count.frozen) for count in counted]
    assert ranks.run(ranks_of_tensor, held_and_trained, configs) == [expected] * ranks_of_tensor


def test_a_frozen_tower_has_no_gradients() -> None:
    """SigLIP SO400M has 0.43 G parameters: 6 and 12 bytes each that a rank need not have."""
    config = run_of(VILA_8B, frozen=True, stages=1)
    config = replace(config, training=replace(config.training, bf16=True))
    trained = replace(config, vision=replace(config.vision, freeze_ViT=False))
    run, kept = tower_parameters(config.vision)
    assert run + kept == pytest.approx(0.428e9, rel=0.01)
    frozen, whole = rank_memory(config, 1), rank_memory(trained, 1)
    assert (whole.weights, whole.gradients) == (frozen.weights, frozen.gradients + 4 * run)
    assert whole.optimizer == frozen.optimizer + 12 * run


def test_packs_count_the_tower() -> None:
    """A loader balances its packs with the pictures' cost, which no layout changes."""
    config = parse(FLAGS)
    family = find_family("vila")
    assert family.image_work(config) > 0
    two = replace(config, parallel=ParallelConfig(pipeline_model_parallel_size=2))
    assert family.image_work(two) == family.image_work(config)
    assert family.image_work(run_of(VILA_8B, frozen=True)) == pytest.approx(16.3, abs=0.1)
    assert family.image_work(run_of(VILA_8B, frozen=False)) == pytest.approx(47.4, abs=0.5)


VPP2 = layout("PP2xVPP2(0+2+1+1)", 2, pp=2, pipeline_model_parallel_layout="E|tt|t|t,L")
ENDS = layout("PP4(0+2+2+0)", 4, pp=4, pipeline_model_parallel_layout="E|tt|tt|L")


@pytest.mark.parametrize(
    ("split", "stage"), [(VPP2, "3"), pytest.param(ENDS, "1", marks=pytest.mark.slow)], ids=["chunks", "ends"]
)
@pytest.mark.distributed
def test_a_first_stage_without_layers(ranks: RankPool, tmp_path: Path, split: Layout, stage: str) -> None:
    """A tower that trains, and a stage in which most pipeline stages train nothing: losses are those of one process."""
    trained = ["--no-freeze-ViT"] if stage == "3" else []
    flags = [*FLAGS, "--stage", stage, "--global-batch-size", "8", "--lr", "4e-5", *trained]
    one = with_weights(parse(flags), ranks, tmp_path)
    expected = ranks.run(1, run, one, 3)[-1]
    trace = ranks.run(split.world_size, run, replace(one, parallel=split.parallel), 3)[-1]
    assert trace.samples == expected.samples
    assert trace.losses == pytest.approx(expected.losses, abs=1e-5, rel=0)
