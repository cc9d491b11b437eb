"""Questions about pictures in tiles: prompts are those of training, and answers what one whole forward pass gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch

from megatron_eve.config import RunConfig
from megatron_eve.data.batch import build_batch
from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig
from megatron_eve.data.text.prompts import encode_text, prompt_text
from megatron_eve.inference.generate import Prompt, _Prompts, generation_config
from megatron_eve.models.registry import find_family
from tests.convert.vila_folders import edit_config
from tests.data.helpers import picture, run, turns
from tests.golden_dir import find_golden
from tests.layouts import ONE, PP2, TP2, Layout, parametrize
from tests.ranks import RankPool

if TYPE_CHECKING:
    from megatron_eve.inference.megatron_engine import MegatronEngine

pytestmark = pytest.mark.distributed

COUNT = 6
# Squares of 28 pixels, each 4 rows: 3 x 1 and 1 x 2 with the whole, and one alone.
SIZES = {"wide.png": ((90, 30), 4), "tall.png": ((30, 61), 3), "square.png": ((28, 28), 1)}
QUESTIONS = [
    ("What is shown?", ["wide.png"]),
    ("Is <image> older than <image>?", ["tall.png", "square.png"]),
    ("Hi.", []),
]


@pytest.fixture(scope="module")
def nvila(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NVILA's folder with dynamic tiles."""
    folder = tmp_path_factory.mktemp("nvila") / "model"
    shutil.copytree(find_golden("golden/vila/vila_main_embed") / "model", folder)
    edit_config(folder, image_aspect_ratio="dynamic", max_tiles=12)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the questions' pictures."""
    folder = tmp_path_factory.mktemp("images")
    for name, (size, _) in SIZES.items():
        picture(*size).save(folder / name)
    return folder


class Answered(NamedTuple):
    """Of each question.

    Attributes:
        prompts: token ids.
        answers: token ids.
        logits: [COUNT, W] that each of these was chosen from.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    logits: list[torch.Tensor]


def config_of(source: Path, layout: Layout) -> RunConfig:
    from megatron_eve.checkpoint.hf.config import settings_of

    sizes, parallel = settings_of(source), layout.parallel
    run_config = RunConfig(family="vila", model=sizes.model, vision=sizes.vision)
    return generation_config(
        run_config, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    )


def check_log_likelihood(
    engine: MegatronEngine, text: str, images: Sequence[bytes], logits: torch.Tensor
) -> None:
    """Of a token after a prompt, against the logits [W] that the first token of its answer was chosen from."""
    context = text.rstrip()
    query = engine.prepare_continuation(text, images, " a")
    assert query.length == engine.prepare(f"{text} a", images, 1).length
    (found,) = engine.log_likelihoods([query])
    log_probability = found.sum
    if space := text[len(context) :]:  # which counts with the continuation
        (before,) = engine.log_likelihoods([engine.prepare_continuation(context, images, space)])
        log_probability -= before.sum
    token = engine._pair(query).continuation[-1]
    assert logits.log_softmax(-1)[token].item() == pytest.approx(log_probability, abs=1e-4)


def answered(source: Path, images: Path, layout: Layout) -> Answered | None:
    """Runs on each rank: all questions in one batch. Without pipeline stages rank 0 has logits."""
    from megatron_eve.checkpoint.hf.load import load_hf_weights
    from megatron_eve.data.text.load_tokenizer import load_tokenizer
    from megatron_eve.inference.megatron_engine import MegatronEngine
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.runtime.ranks import global_rank

    config = config_of(source, layout)
    tokenizer = load_tokenizer(str(source / "llm" / "tokenizer.json"), False)
    with model_parallel(config), torch.no_grad():
        (model,) = build_chunks(config, freeze=False)
        load_hf_weights(source, [model], config)
        steps: list[torch.Tensor] = []
        model.register_forward_hook(lambda _, __, logits: steps.append(logits.clone()))
        engine = MegatronEngine(model, config, tokenizer, "qwen2")
        engine._stop_ids = set()  # so that all have as many tokens
        if global_rank():
            engine.follow()
            return None
        files = [[(images / name).read_bytes() for name in names] for _, names in QUESTIONS]
        queries = [
            engine.prepare(prompt_text(text, "qwen2", len(some)), some, COUNT)
            for (text, _), some in zip(QUESTIONS, files, strict=True)
        ]
        found = engine.answers(queries)
        has_logits = layout.parallel.pipeline_model_parallel_size == 1
        first = (
            [(query.images, steps[0][number]) for number, query in enumerate(queries)] if has_logits else []
        )
        for (text, _), (some, logits) in zip(QUESTIONS, first, strict=False):
            check_log_likelihood(engine, prompt_text(text, "qwen2", len(some)), some, logits)
        engine.dismiss()
    return Answered(
        [encode_text(query.text, tokenizer, "qwen2") for query in queries],
        [list(answer.tokens) for answer in found],
        [torch.stack(some) for some in zip(*steps[:COUNT], strict=True)] if has_logits else [],
    )


def forward(source: Path, images: Path, texts: list[list[int]]) -> list[torch.Tensor]:
    """Runs on a rank: logits [L, W] of whole texts, as training computes them."""
    from megatron_eve.checkpoint.hf.load import load_hf_weights
    from megatron_eve.inference.generate import _prompt_batch
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.microbatch import DevicePack, model_inputs

    config = config_of(source, ONE)
    with model_parallel(config), torch.no_grad():
        (model,) = build_chunks(config, freeze=False)
        load_hf_weights(source, [model], config)
        prompts = [
            Prompt(text, [(images / name).read_bytes() for name in names])
            for text, (_, names) in zip(texts, QUESTIONS, strict=True)
        ]
        batch = _prompt_batch(prompts, config, apply_exif=True)
        inputs = model_inputs(DevicePack(batch), model)
        inputs.labels, inputs.output_rows = None, torch.arange(len(batch.tokens))
        rows = model(inputs)
        return [rows[first:last].clone() for first, last in pairwise(batch.cu_seqlens.tolist())]


@pytest.fixture(scope="module")
def alone(ranks: RankPool, nvila: Path, images: Path) -> Answered:
    """On one rank."""
    (found,) = ranks.run(1, answered, nvila, images, ONE)
    assert found is not None
    return found


def test_logits_are_those_of_one_forward_pass(
    ranks: RankPool, nvila: Path, images: Path, alone: Answered
) -> None:
    texts = [prompt + answer for prompt, answer in zip(alone.prompts, alone.answers, strict=True)]
    (whole,) = ranks.run(1, forward, nvila, images, texts)
    tiles = [sum(SIZES[name][1] for name in names) for _, names in QUESTIONS]
    for prompt, rows, logits, count in zip(alone.prompts, whole, alone.logits, tiles, strict=True):
        assert prompt.count(-200) == count and len(rows) == len(prompt) + COUNT + 3 * count
        torch.testing.assert_close(logits, rows[-COUNT - 1 : -1], rtol=0, atol=1e-5)


@parametrize(TP2, slow=(PP2,))
def test_layouts_change_nothing(
    ranks: RankPool, nvila: Path, images: Path, alone: Answered, layout: Layout
) -> None:
    found, _ = ranks.run(layout.world_size, answered, nvila, images, layout)
    assert (found.prompts, found.answers) == (alone.prompts, alone.answers)
    for logits, expected in zip(found.logits, alone.logits, strict=False):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_prompts_are_those_of_training(nvila: Path, images: Path, alone: Answered, tmp_path: Path) -> None:
    """Ids, and pixels: a dataset of the same questions, made by the tool, opened by the folder's settings."""
    rows: list[dict[str, Any]] = [
        {"image": names, "conversations": turns(text, "Yes.")} for text, names in QUESTIONS
    ]
    rows[0]["conversations"] = turns("<image>\nWhat is shown?", "Yes.")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = config_of(nvila, ONE)
    vision, settings = config.vision, find_family("vila").image_settings(config)
    assert (vision.image_fit, vision.max_tiles, vision.projector_token_order) == ("tiles", 12, "row")
    made = PreprocessConfig(
        input=str(tmp_path / "rows.json"),
        image_root=str(images),
        tokenizer_model=str(nvila / "llm" / "tokenizer.json"),
        output_prefix=str(tmp_path / "set"),
        family="vila",
        template="qwen2",
        image_settings=settings,
    )
    run(made)
    dataset = open_dataset(made.output_prefix)
    dataset.use_image_settings("vila", settings)
    meta = json.loads((find_golden("golden/vila/vila_main_embed") / "meta.json").read_text())
    newline = meta["special"]["newline_ids"]
    for row, prompt in enumerate(alone.prompts):
        tokens, labels = dataset.text(row)
        assert tokens[: len(prompt)].tolist() == prompt
        assert (labels[: len(prompt)] == -100).all() and (labels[len(prompt) :] != -100).any()
        for place in np.flatnonzero(tokens == -200):
            assert tokens[place + 1 : place + 1 + len(newline)].tolist() == newline
    batch = build_batch(dataset, range(3), tensor_parallel=1, context_parallel=1, views=["tower"])
    prompts = [
        Prompt(prompt, [(images / name).read_bytes() for name in names])
        for prompt, (_, names) in zip(alone.prompts, QUESTIONS, strict=True)
    ]
    asked = _Prompts(prompts, config, apply_exif=True)
    asked_batch = build_batch(asked, range(3), tensor_parallel=1, context_parallel=1, views=["tower"])
    assert len(batch.image_rows) == 8 and torch.equal(batch.pixels["tower"], asked_batch.pixels["tower"])
