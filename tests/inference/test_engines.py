"""Engines: a batch answers as each prompt alone, a stream as a batch, and ranks that follow stay in step."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from megatron_eve.config import ModelConfig, RunConfig
from megatron_eve.data.conversation import prompt_text
from megatron_eve.inference.engine import Answer
from megatron_eve.inference.generate import generation_config
from tests.golden_dir import find_golden
from tests.inference.test_generate import picture
from tests.layouts import ONE, PP2, TP2, Layout, parametrize
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

COUNT = 12
PROMPTS = [
    (prompt_text("What is it?", "vicuna_v1", 1), [picture(90, 60)]),
    (prompt_text("Hi.", "vicuna_v1", 0), []),
    (prompt_text("And now?", "vicuna_v1", 2, [("Two?", "Yes.")]), [picture(40, 100), picture(64, 64)]),
    (prompt_text("", "plain", 1), [picture(30, 200)]),
    (prompt_text("猫?", "vicuna_v1", 1), [picture(64, 64)]),
]


def everything(layout: Layout, batch_size: int) -> tuple[list[Answer], list[str], str] | None:
    """Runs on each rank: answers in batches, the same streamed, and the beginning of a stream that is left."""
    from megatron_eve.convert.load import load_hf_weights
    from megatron_eve.data.tokenizer import Tokenizer
    from megatron_eve.inference.megatron_engine import MegatronEngine
    from megatron_eve.training.initialize import global_rank, model_parallel
    from megatron_eve.training.model import build_chunks

    parallel = layout.parallel
    config = generation_config(
        RunConfig(model=ModelConfig()),
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    tokenizer = Tokenizer(find_golden("tokenize") / "tokenizer.model")
    with model_parallel(config):
        (model,) = build_chunks(config, freeze=False)
        load_hf_weights(find_golden("_shared/hf_mini224"), [model], config.model)
        engine = MegatronEngine(model, config.model, tokenizer, "vicuna_v1")
        if global_rank():
            engine.follow()
            return None
        queries = [engine.prepare(text, images, COUNT) for text, images in PROMPTS]
        left = engine.stream(queries[0], COUNT)
        beginning = next(left)
        left.close()
        answers: list[Answer] = []
        for start in range(0, len(queries), batch_size):
            answers += engine.answers(queries[start : start + batch_size], COUNT)
        streamed = ["".join(engine.stream(query, COUNT)) for query in queries]
        engine.dismiss()
        return answers, streamed, beginning


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> list[Answer]:
    """What each prompt gets by itself on one rank."""
    (found,) = ranks.run(1, everything, ONE, 1)
    assert found is not None
    return found[0]


@pytest.mark.parametrize("batch_size", [2, 5])
@parametrize(ONE, TP2, PP2)
def test_answers_depend_on_neither_batch_nor_layout_nor_stream(
    ranks: RankPool, alone: list[Answer], layout: Layout, batch_size: int
) -> None:
    found, *followers = ranks.run(layout.world_size, everything, layout, batch_size)
    answers, streamed, beginning = found
    assert answers == alone
    assert streamed == [answer.text for answer in alone]
    assert beginning and alone[0].text.startswith(beginning)
    assert followers == [None] * (layout.world_size - 1)
    assert all(0 < len(answer.tokens) <= COUNT for answer in answers)


def refusals() -> list[str]:
    """Runs on a rank: what `prepare` says of prompts that it does not take."""
    from megatron_eve.data.errors import SkipRow
    from megatron_eve.data.tokenizer import Tokenizer
    from megatron_eve.inference.megatron_engine import MegatronEngine

    tokenizer = Tokenizer(find_golden("tokenize") / "tokenizer.model")
    engine = MegatronEngine(None, ModelConfig(), tokenizer, "vicuna_v1")  # type: ignore[arg-type]
    large = io.BytesIO()
    Image.new("1", (20_000, 5_000)).save(large, "PNG")
    found = []
    for text, images, count in (
        ("<image>", [picture(90, 60)[:-300]], 1),
        ("<image>", [b"<svg onload=alert(1)>"], 1),
        ("<image>", [large.getvalue()], 1),
        ("word " * 2000, [], 1),
        ("Hi.", [], 2048),
    ):
        try:
            engine.prepare(text, images, count)
        except SkipRow as error:
            found.append(error.reason)
    return found


def test_what_a_prompt_may_not_be(ranks: RankPool) -> None:
    (found,) = ranks.run(1, refusals)
    assert found == ["image_damaged", "image_format", "image_too_large", "prompt_too_long", "prompt_too_long"]
