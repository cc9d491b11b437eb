"""Engines: a batch answers as each prompt alone, a stream as a batch, transformers as megatron-core."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save

from megatron_eve.checkpoint.state import saved_config
from megatron_eve.config import ConfigError, ModelConfig, RunConfig
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.text.prompts import prompt_text
from megatron_eve.inference.engine import Answer, Engine
from megatron_eve.inference.generate import generation_config
from tests.convert.test_conversion import convert
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
    left = engine.stream(queries[0])
    beginning = next(left)
    left.close()
    answers: list[list[Answer]] = [[] for _ in BATCH_SIZES]
    for found, size in zip(answers, BATCH_SIZES, strict=True):
        for start in range(0, len(queries), size):
            found += engine.answers(queries[start : start + size])
    return answers, ["".join(engine.stream(query)) for query in queries], beginning


def on_ranks(layout: Layout, work: Callable[[Engine], Any] = everything) -> Any:
    """Runs on each rank: rank 0 does the work, the others follow and return None."""
    from megatron_eve.checkpoint.hf.load import load_hf_weights
    from megatron_eve.data.text.tokenizer import Tokenizer
    from megatron_eve.inference.megatron_engine import MegatronEngine
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.runtime.ranks import global_rank

    parallel = layout.parallel
    config = generation_config(
        RunConfig(model=ModelConfig()),
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    tokenizer = Tokenizer(find_golden("tokenize") / "tokenizer.model")
    with model_parallel(config):
        (model,) = build_chunks(config, freeze=False)
        load_hf_weights(find_golden("_shared/hf_mini224"), [model], config)
        engine = MegatronEngine(model, config, tokenizer, "vicuna_v1")
        if global_rank():
            engine.follow()
            return None
        found = work(engine)
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


@pytest.fixture(scope="module")
def saved_again(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported folder as transformers saves it, which writes no tokenizer.model and fewer files."""
    from transformers import AutoModelForCausalLM, AutoProcessor

    import megatron_eve.hf  # noqa: F401

    folder = tmp_path_factory.mktemp("saved") / "tuned"
    for kind in (AutoProcessor, AutoModelForCausalLM):
        kind.from_pretrained(exported).save_pretrained(folder)
    assert not (folder / "tokenizer.model").exists()
    return folder


def test_a_folder_that_transformers_saved_answers_and_is_imported(
    saved_again: Path, exported: Path, tmp_path: Path
) -> None:
    from megatron_eve.inference.hf_engine import HFEngine

    text, images = PROMPTS[2]
    found = []
    for folder in (saved_again, exported):
        engine = HFEngine(folder, "vicuna_v1")
        found.append(engine.answers([engine.prepare(text, images, COUNT)]))
    assert found[0] == found[1]
    assert convert("import", "--source", saved_again, "--target", tmp_path / "run") == 0
    saved = saved_config(str(tmp_path / "run"))["vision"]
    assert (saved["image_size"], saved["teacher_size"]) == (224, 112)


def test_a_folder_whose_parts_do_not_belong_together_is_refused_in_a_sentence(
    saved_again: Path, tmp_path: Path
) -> None:
    """Other tokenizers, weights that are missing (which transformers would draw), damaged files."""
    from megatron_eve.inference.hf_engine import HFEngine

    def renamed(tensors: dict[str, Any]) -> dict[str, Any]:
        return {f"other.{name}": tensor for name, tensor in tensors.items()}

    weights, settings = "model.safetensors", json.loads((saved_again / "config.json").read_text())
    for name, content, message in (
        ("tokenizer.json", b"{", "transformers cannot open it"),
        (weights, (saved_again / weights).read_bytes()[:1000], "transformers cannot open it"),
        (weights, save(renamed(load_file(saved_again / weights))), "weights are missing, such as "),
        (
            "config.json",
            json.dumps({**settings, "image_token_index": 7}).encode(),
            "is not the one that this",
        ),
        (
            "config.json",
            b'{"model_type": "llama"}',
            "holds a model of type 'llama', none of those that are known here (EVE v1",
        ),
    ):
        folder = tmp_path / name
        shutil.copytree(saved_again, folder)
        (folder / name).write_bytes(content)
        with pytest.raises(ConfigError, match="--model-path") as error:
            HFEngine(folder, "vicuna_v1")
        assert message in str(error.value)
        shutil.rmtree(folder)


def test_pieces_make_the_text_that_sentencepiece_makes(exported: Path) -> None:
    """Broken characters and the space in front among them."""
    from transformers import AutoTokenizer

    from megatron_eve.data.text.tokenizer import Tokenizer
    from megatron_eve.inference.hf_engine import PieceText

    ours = Tokenizer(exported / "tokenizer.model")
    pieces = PieceText(AutoTokenizer.from_pretrained(exported))
    size, random = ours.vocab_size, np.random.default_rng(1)
    for highest in (size, 3 + 256):  # the bytes come first
        for count in random.integers(0, 12, 1000):
            ids = random.integers(0, highest, count).tolist()
            assert pieces.decode(ids) == ours.decode(ids), ids


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
    from megatron_eve.data.text.tokenizer import Tokenizer
    from megatron_eve.inference.megatron_engine import MegatronEngine

    tokenizer = Tokenizer(find_golden("tokenize") / "tokenizer.model")
    engine = MegatronEngine(None, RunConfig(), tokenizer, "vicuna_v1")  # type: ignore[arg-type]
    padded = tokenizer.vocab_size + 1  # a row that the embedding was padded with
    assert engine._text([padded, *tokenizer.encode("Hi"), padded]) == "Hi"
    return refusals(engine)


def test_what_a_prompt_may_not_be(ranks: RankPool, exported: Path) -> None:
    from megatron_eve.inference.hf_engine import HFEngine

    (found,) = ranks.run(1, refusals_on_a_rank)
    assert found == ["image_damaged", "image_format", "image_too_large", "prompt_too_long", "prompt_too_long"]
    assert refusals(HFEngine(exported, "vicuna_v1")) == found
