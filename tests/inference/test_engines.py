"""Engines: a batch answers as each prompt alone, a stream as a batch, transformers as megatron-core."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_eve.config import ModelConfig, RunConfig
from megatron_eve.data.conversation import prompt_text
from megatron_eve.data.errors import SkipRow
from megatron_eve.inference.engine import Answer, Engine
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


Found = tuple[list[list[Answer]], list[str], str]
"""Answers in batches of each of BATCH_SIZES, the same streamed, and the beginning of a stream that is left."""
BATCH_SIZES = (1, 2, 5)


def everything(engine: Engine) -> Found:
    queries = [engine.prepare(text, images, COUNT) for text, images in PROMPTS]
    left = engine.stream(queries[0], COUNT)
    beginning = next(left)
    left.close()
    answers: list[list[Answer]] = [[] for _ in BATCH_SIZES]
    for found, size in zip(answers, BATCH_SIZES, strict=True):
        for start in range(0, len(queries), size):
            found += engine.answers(queries[start : start + size], COUNT)
    return answers, ["".join(engine.stream(query, COUNT)) for query in queries], beginning


def on_ranks(layout: Layout) -> Found | None:
    """Runs on each rank: rank 0 asks, the others follow."""
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
        found = everything(engine)
        engine.dismiss()
        return found


def check(found: Found, alone: list[Answer]) -> None:
    answers, streamed, beginning = found
    assert answers == [alone] * len(BATCH_SIZES)
    assert streamed == [answer.text for answer in alone]
    assert beginning and alone[0].text.startswith(beginning)
    assert all(0 < len(answer.tokens) <= COUNT for answer in alone)


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> list[Answer]:
    """What each prompt gets by itself on one rank."""
    (found,) = ranks.run(1, on_ranks, ONE)
    assert found is not None
    check(found, found[0][0])
    return found[0][0]


@parametrize(TP2, slow=(PP2,))
def test_answers_depend_on_neither_batch_nor_layout_nor_stream(
    ranks: RankPool, alone: list[Answer], layout: Layout
) -> None:
    found, *followers = ranks.run(layout.world_size, on_ranks, layout)
    check(found, alone)
    assert followers == [None] * (layout.world_size - 1)


def test_transformers_answers_the_same_and_runs_no_code_of_the_folder(
    exported: Path, tmp_path: Path, alone: list[Answer]
) -> None:
    from megatron_eve.inference.hf_engine import HFEngine

    folder = tmp_path / "eve"
    shutil.copytree(exported, folder)
    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit('the code of the folder ran')")
    check(everything(HFEngine(folder, "vicuna_v1")), alone)


def turned(width: int, height: int) -> bytes:
    """A JPEG of a gradient that lies on its side, as its EXIF data says."""
    pixels = np.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype(np.uint8)
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(stream, "JPEG", exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize("apply_exif", [True, False])
def test_a_picture_is_turned_once_or_not_at_all(exported: Path, apply_exif: bool) -> None:
    from megatron_eve.inference.hf_engine import HFEngine

    engine = HFEngine(exported, "plain", apply_exif)
    query = engine.prepare("<image>", [turned(90, 30)], COUNT)
    rows, columns = engine._inputs([query])["image_grids"][0, 0].tolist()
    assert (rows > columns) == apply_exif
    assert query.length == engine._inputs([query])["input_ids"].shape[1]


def refusals(engine: Engine) -> list[str]:
    """What `prepare` says of prompts that it does not take."""
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


def refusals_on_a_rank() -> list[str]:
    """Runs on a rank."""
    from megatron_eve.data.tokenizer import Tokenizer
    from megatron_eve.inference.megatron_engine import MegatronEngine

    tokenizer = Tokenizer(find_golden("tokenize") / "tokenizer.model")
    return refusals(MegatronEngine(None, ModelConfig(), tokenizer, "vicuna_v1"))  # type: ignore[arg-type]


def test_what_a_prompt_may_not_be(ranks: RankPool, exported: Path) -> None:
    from megatron_eve.inference.hf_engine import HFEngine

    (found,) = ranks.run(1, refusals_on_a_rank)
    assert found == ["image_damaged", "image_format", "image_too_large", "prompt_too_long", "prompt_too_long"]
    assert refusals(HFEngine(exported, "vicuna_v1")) == found
