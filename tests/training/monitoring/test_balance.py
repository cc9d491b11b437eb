"""What the ends of a pipeline cost, and which split of the layers is most even."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from megatron_eve.config import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_eve.config.pipeline_layout import parse_layout
from megatron_eve.config.recipe import parse
from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.models.model_parts import Work
from megatron_eve.training.loop.data import open_data
from megatron_eve.training.monitoring.balance import (
    EndCosts,
    best_split,
    describe_balance,
    end_costs,
    even_layers,
    typical_work,
    wasted,
)


def test_waste_by_hand() -> None:
    # Stages of 4 + 1, 4, 4 and 4 + 3 layers' work: 5 on average, and all wait for 7.
    assert wasted((4, 4, 4, 4), 4, EndCosts(1, 3)) == pytest.approx(1 - 5 / 7)
    assert wasted((4, 5, 5, 2), 4, EndCosts(1, 3)) == 0
    # Two turns of two chunks each: 3 + 1 beside 2, then 1 beside 2 + 2; (4 + 2 + 1 + 4) / 2 = 5.5 of 8.
    assert wasted((3, 2, 1, 2), 2, EndCosts(1, 2)) == pytest.approx(1 - 5.5 / 8)


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("costs", [EndCosts(0, 0), EndCosts(1.4, 0.6), EndCosts(0.2, 3.3), EndCosts(9.5, 2)])
def test_no_split_is_more_even(stages: int, costs: EndCosts) -> None:
    """Against all splits of 9 layers, stages without a layer among them."""
    splits = [split for split in itertools.product(range(10), repeat=stages) if sum(split) == 9]
    least = min(wasted(split, stages, costs) for split in splits)
    assert wasted(best_split(9, stages, 1, costs), stages, costs) == pytest.approx(least, abs=1e-12)


def test_chunks_of_the_interleaved_schedule() -> None:
    assert best_split(8, 2, 2, EndCosts(0, 0)) == (2, 2, 2, 2)
    assert best_split(32, 4, 2, EndCosts(1.5, 0.9)) == (3, 5, 4, 4, 4, 4, 4, 4)
    # A front end of more work than a chunk leaves the first without a layer.
    assert best_split(8, 2, 2, EndCosts(4, 0)) == (0, 3, 2, 3)


def test_even_layers() -> None:
    assert even_layers(32, 4, EndCosts(1.5, 0)) == (6.875, 8.375)
    assert even_layers(8, 4, EndCosts(12, 0)) == (0, 5)


MODEL = ModelConfig(
    num_layers=2, hidden_size=4, ffn_hidden_size=3, num_attention_heads=2, num_query_groups=1, vocab_size=5
)
VISION = EVEConfig(patch_embedding_size=2, patch_embedding_heads=1, image_size=28, patch_aligning=False)
WORK = Work(tokens=13, attended=61, labels=4, images=1, merged_patches=4, image_rows=7)


def test_ends_by_hand() -> None:
    """The hand-worked step of test_flops.py: 76944 + 1008 on the first stage, (13104 + 5856) / 2 a layer, 480."""
    config = RunConfig(model=MODEL, vision=VISION)
    layer = (13104 + 5856) / 2
    assert end_costs(config, WORK) == pytest.approx((77952 / layer, 480 / layer))
    # Each rank embeds all pictures of a pack, while it has a part of the decoder.
    four = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2)
    assert end_costs(replace(config, parallel=four), WORK).first == pytest.approx(4 * 77952 / layer)
    # A layer that is recomputed runs forward twice.
    again = TrainingConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    assert end_costs(replace(config, training=again), WORK).last == pytest.approx(480 / (layer * 4 / 3))


MOCK = [
    "--preset",
    "eve_mini",
    "--mock-data",
    "--train-iters",
    "3",
    "--global-batch-size",
    "4",
    "--seq-length",
    "512",
]


def test_typical_samples_are_the_run_s_own() -> None:
    config = parse(MOCK)
    data = open_data(config)
    work, samples = typical_work(config, data)
    records = data.dataset.samples[data.order(np.arange(12))]  # three steps of four
    counted = (work.tokens, work.labels, work.images)
    assert samples == 12
    assert counted == tuple(int(records[name].sum()) for name in ("length", "labels", "num_images"))


def test_what_a_run_prints() -> None:
    config = parse(MOCK)
    data = open_data(config)
    assert describe_balance(config, data) is None  # no pipeline
    uneven = parse([*MOCK, "--pipeline-model-parallel-size", "2", "--decoder-first-pipeline-num-layers", "7"])
    lines = (describe_balance(uneven, data) or "").split("\n")
    assert len(lines) == 2 and lines[0].startswith(
        "pipeline balance (FLOPs of 12 samples of the run): the front end"
    )
    assert "this run's (Et*7|t,L) 4" in lines[1] and lines[1].endswith("'")
    proposed = lines[1].split("'")[-2]
    assert sum(parse_layout(proposed)) == 8
    again = parse(
        [*MOCK, "--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", proposed]
    )
    assert (describe_balance(again, data) or "").endswith("no split wastes much less")
