"""Generation with a cache gives what running everything again would give, under any layout, alone or in a batch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megatron_eve.config import ModelConfig, RunConfig, TrainingConfig
from megatron_eve.data.text.conversation import IMAGE_TOKEN_ID
from megatron_eve.inference.generate import Prompt, generation_config
from tests.golden_dir import find_golden
from tests.layouts import ONE, PP2, TP2, TP2_PP2, TP2_SP, Layout, parametrize
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed


def picture(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


PROMPTS = [
    Prompt([1, IMAGE_TOKEN_ID, 40, 41], [picture(90, 60)]),
    Prompt([1, 30, 31, 32, 33, 34]),
    Prompt([1, IMAGE_TOKEN_ID, 50, IMAGE_TOKEN_ID, 51], [picture(40, 100), picture(64, 64)]),
]


def answers(
    config: RunConfig, prompts: Sequence[Prompt], count: int, stop_ids: tuple[int, ...] = ()
) -> list[list[int]]:
    """Runs on each rank."""
    from megatron_eve.checkpoint.hf.load import load_hf_weights
    from megatron_eve.inference.generate import generate
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel

    with model_parallel(config):
        (model,) = build_chunks(config, freeze=False)
        load_hf_weights(find_golden("_shared/hf_mini224"), [model], config)
        return generate(model, prompts, config, max_new_tokens=count, stop_ids=stop_ids)


def without_cache(config: RunConfig, prompt: Prompt, count: int) -> list[int]:
    """Runs on each rank: the whole sequence again for every token."""
    tokens: list[int] = []
    for _ in range(count):
        (new,) = answers(config, [Prompt(prompt.tokens + tokens, prompt.images)], 1)
        tokens += new
    return tokens


def config_of(layout: Layout) -> RunConfig:
    parallel = layout.parallel
    return generation_config(
        RunConfig(model=ModelConfig()),
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
    )


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> list[list[int]]:
    return [ranks.run(1, without_cache, config_of(ONE), prompt, 6)[0] for prompt in PROMPTS]


@parametrize(ONE, TP2, PP2, TP2_PP2)
def test_cache_layout_and_batch_change_nothing(
    ranks: RankPool, expected: list[list[int]], layout: Layout
) -> None:
    found = ranks.run(layout.world_size, answers, config_of(layout), PROMPTS, 6)
    assert all(some == expected for some in found), "every rank gets every answer"


def test_stopping_one_sample_leaves_the_others(ranks: RankPool, expected: list[list[int]]) -> None:
    stop = expected[0][2]
    (found,) = ranks.run(1, answers, config_of(ONE), PROMPTS, 6, (stop,))
    for ours, whole in zip(found, expected, strict=True):
        assert ours == (whole[: whole.index(stop)] if stop in whole else whole)
    assert len(found[0]) == expected[0].index(stop)


def test_generation_needs_no_training_layout() -> None:
    training = TrainingConfig(bf16=True, recompute_granularity="selective")
    trained = RunConfig(parallel=replace(TP2_SP.parallel, context_parallel_size=2), training=training)
    config = generation_config(trained, 2, 1)
    assert config.parallel.tensor_model_parallel_size == 2 and not config.parallel.sequence_parallel
    assert config.parallel.context_parallel_size == config.parallel.pipeline_model_parallel_size == 1
    assert config.parallel.variable_seq_lengths
    assert config.training.bf16 and config.training.recompute_granularity is None
