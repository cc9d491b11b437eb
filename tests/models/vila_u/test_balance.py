"""What VILA-U's depth transformer costs, against the arithmetic of its design; its memory against its modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from megatron_eve.config import PRESETS, ParallelConfig, RunConfig, TrainingConfig, parse
from megatron_eve.data.sampling.packing import sample_work
from megatron_eve.models.flops import TRAINED, decoder_layer
from megatron_eve.models.model_parts import Work
from megatron_eve.models.registry import find_family
from megatron_eve.models.vila_u.flops import position_flops
from megatron_eve.training.loop.data import open_data
from megatron_eve.training.monitoring.balance import best_split, describe_balance, end_costs
from tests.ranks import RankPool

SIZES = PRESETS["vila_u_7b"]
# The tower of 384 pixels: 27 x 27 positions of 16 codes, 1152 wide.
LARGE = SIZES._replace(
    vision=replace(SIZES.vision, code_grid=27, codes_per_position=16, code_vector_size=1152)
)
FLAGS = ["--preset", "vila_u_tiny", "--mock-data", "--seq-length", "512", "--train-iters", "4"]


def run_of(sizes: object, stages: int) -> RunConfig:
    assert isinstance(sizes, type(SIZES))
    return RunConfig(
        family="vila_u",
        model=sizes.model,
        vision=sizes.vision,
        parallel=ParallelConfig(pipeline_model_parallel_size=stages),
        training=TrainingConfig(stage=2),
    )


def drawn(sizes: object, text: int) -> Work:
    """A sentence and the picture that is drawn of it."""
    assert isinstance(sizes, type(SIZES))
    rows = sizes.vision.rows
    tokens = rows + text
    return Work(tokens, tokens * (tokens + 1) // 2, 4, 1, rows, rows, rows)


@pytest.mark.parametrize(("sizes", "share"), [(SIZES, 0.32), (LARGE, 1.28)], ids=["D4", "D16"])
def test_the_head_against_the_decoder(sizes: object, share: float) -> None:
    """For each position to be drawn: 32 % of the decoder with 4 codes, 128 % with 16."""
    assert isinstance(sizes, type(SIZES))
    decoder = TRAINED * 32 * decoder_layer(sizes.model)
    assert position_flops(sizes.vision, 4096) / decoder == pytest.approx(share, abs=0.01)
    assert find_family("vila_u").visual_label_work(run_of(sizes, 1)) == pytest.approx(share, abs=0.01)


def test_the_split_of_a_run_that_draws() -> None:
    """A sentence and a picture cost the last stage of the small tower 7.9 decoder layers."""
    costs = end_costs(run_of(SIZES, 4), drawn(SIZES, 75))
    assert costs.last == pytest.approx(7.9, abs=0.1)
    assert best_split(32, 4, 1, costs)[-1] == 2
    assert end_costs(run_of(LARGE, 4), drawn(LARGE, 75)).last == pytest.approx(36, abs=1)


@pytest.mark.parametrize(("codes", "even"), [(2, True), (16, False)])
def test_what_a_run_prints(codes: int, even: bool) -> None:
    flags = [*FLAGS, "--pipeline-model-parallel-size", "4", "--codes-per-position", str(codes)]
    if not even:
        flags += ["--depth-hidden-size", "256"]
    config = parse(flags)
    lines = (describe_balance(config, open_data(config)) or "").split("\n")
    assert "the output layer and objectives" in lines[0]
    advice = [line for line in lines if "--pipeline-model-parallel-size 1" in line]
    assert bool(advice) == (not even)
    assert even or advice[0].startswith("no split is even: without a layer the last stage has ")


def test_packs_count_the_head() -> None:
    sizes, labels = np.array([300, 300, 700]), np.array([0, 256, 0])
    work = sample_work(sizes, other_work=1.28 * labels)
    assert (work - sample_work(sizes)).tolist() == pytest.approx([0, 327.68, 0])
    family, config = find_family("vila_u"), run_of(SIZES, 1)
    two = replace(config, parallel=ParallelConfig(pipeline_model_parallel_size=2))
    assert family.visual_label_work(two) == family.visual_label_work(config)


def held_and_trained(configs: Sequence[RunConfig]) -> list[tuple[int, ...]]:
    """Runs on each rank: parameters of front end and head, and those of them that train."""
    from megatron_eve.models.build import transformer_config
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.models.stages import stage_of

    found = []
    with model_parallel(configs[0]):
        for config in configs:
            family, transformer = find_family(config.family), transformer_config(config)
            (objective,) = family.objectives(config)
            modules = {
                "vision_model": family.front_end(config, transformer),
                str(objective.module): objective.head(transformer),
            }
            counts: list[int] = []
            for prefix, module in modules.items():
                named = [(f"{prefix}.{name}", p) for name, p in module.named_parameters()]  # type: ignore[attr-defined]
                counts.append(sum(p.numel() for _, p in named))
                counts.append(sum(p.numel() for name, p in named if stage_of(config).trains(name)))
            found.append(tuple(counts))
    return found


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.distributed
def test_every_parameter_is_counted(ranks: RankPool, tensor: int) -> None:
    """On each tensor-parallel rank; the codebook is whole on both stages and never trains."""
    parallel, tiny = ParallelConfig(tensor_model_parallel_size=tensor), PRESETS["vila_u_tiny"]
    configs = [
        RunConfig(
            family="vila_u",
            model=tiny.model,
            vision=replace(tiny.vision, separate_codebooks=separate),
            parallel=parallel,
            training=TrainingConfig(stage=2),
        )
        for separate in (False, True)
    ]
    counted = [find_family("vila_u").parameter_counts(config) for config in configs]
    expected = [
        (one.first_stage, one.first_stage - one.frozen, one.last_stage, one.last_stage - one.last_frozen)
        for one in counted
    ]
    assert ranks.run(tensor, held_and_trained, configs) == [expected] * tensor
