"""Questions about pictures to a model that reads them as codes: prompts are those of training, under any layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_eve.config import ConfigError
from megatron_eve.data.batch import build_batch
from megatron_eve.data.format.code_part import open_codes
from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.opening import open_datasets
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig
from megatron_eve.data.text.prompts import encode_text, prompt_text
from megatron_eve.inference.code_tower import ModelTower, find_tower
from megatron_eve.inference.engine import BatchDrawingEngine, DrawingEngine
from megatron_eve.inference.generate import Prompt, _Prompts, generation_config
from megatron_eve.inference.sampling import DRAWING
from megatron_eve.models.registry import find_image_codes
from tests.data.helpers import picture, run, turns
from tests.inference.test_tiles import check_log_likelihood
from tests.inference.test_tools import tool
from tests.inference.vila_u_model import Model, write_model
from tests.layouts import ONE, PP2, TP2, Layout, parametrize
from tests.models.vila_u.towers import CONFIG, changed, write_tower
from tests.ranks import RankPool
from tests.test_commands import ROOT, command

pytestmark = pytest.mark.distributed

COUNT, ROWS = 6, 16
SIZES = {"wide.png": (90, 30), "tall.png": (30, 61), "square.png": (32, 32)}
QUESTIONS = [
    ("What is shown?", ["wide.png"]),
    ("Is <image> older than <image>?", ["tall.png", "square.png"]),
    ("Hi.", []),
    ("What is shown?", ["square.png"]),
]
IM_START, IM_END, VOCABULARY = 384, 385, 388


@pytest.fixture(scope="module")
def model(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return write_model(tmp_path_factory.mktemp("model"), ranks)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the questions' pictures."""
    folder = tmp_path_factory.mktemp("images")
    for number, (name, size) in enumerate(SIZES.items()):
        picture(*size, seed=number).save(folder / name)
    return folder


def files(images: Path, names: list[str]) -> list[bytes]:
    return [(images / name).read_bytes() for name in names]


def named_tower(model: Model, dtype: str = "float32") -> ModelTower:
    return ModelTower("vila_u", find_image_codes("vila_u").read_tower(model.tower, {}), dtype)


def tokenizer_of(model: Model) -> Any:
    from megatron_eve.data.text.load_tokenizer import load_tokenizer
    from megatron_eve.models.vila_u.templates import SPECIAL_TOKENS

    return load_tokenizer(model.tokenizer, False, SPECIAL_TOKENS)


class Answered(NamedTuple):
    """Of each question.

    Attributes:
        prompts: token ids.
        answers: token ids.
        logits: [COUNT, W] that each of these was chosen from.
        pictures: uint8 [5, 32, 32, 3] that were drawn: two of a text, then one of each of three queries.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    logits: list[torch.Tensor]
    pictures: np.ndarray


def answered(model: Model, images: Path, layout: Layout) -> Answered | None:
    """Runs on each rank: all questions in one batch. Without pipeline stages rank 0 has logits."""
    from megatron_eve.inference.megatron_engine import MegatronEngine
    from megatron_eve.inference.picture_codes import PictureCodes
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.runtime.ranks import global_rank
    from tests.inference.test_drawing import loaded

    parallel = layout.parallel
    config = generation_config(
        model.config, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    )
    tower = PictureCodes(named_tower(model)) if global_rank() == 0 else None
    tokenizer = tokenizer_of(model)
    with model_parallel(config), torch.no_grad():
        stage = loaded(config, model.run)
        steps: list[torch.Tensor] = []
        stage.register_forward_hook(lambda _, __, logits: steps.append(logits.clone()))
        engine = MegatronEngine(stage, config, tokenizer, "v1", picture_codes=tower)
        engine._stop_ids = set()  # so that all have as many tokens
        if global_rank():
            engine.follow()
            return None
        queries = [
            engine.prepare(prompt_text(text, "v1", len(names)), files(images, names), COUNT)
            for text, names in QUESTIONS
        ]
        found = engine.answers(queries)
        if parallel.pipeline_model_parallel_size == 1:
            first = list(steps[0])
            for (text, names), logits in zip(QUESTIONS, first, strict=True):
                check_log_likelihood(
                    engine, prompt_text(text, "v1", len(names)), files(images, names), logits
                )
        assert isinstance(engine, DrawingEngine)
        left = engine.draw("A red car.", 1, 3.0, DRAWING)
        assert (next(left).done, next(left).done) == (1, 2)
        left.close()
        assert engine.answers(queries[:1]) == found[:1]
        *steps_drawn, last = engine.draw("A red car.", 2, 3.0, DRAWING)
        assert [step.done for step in steps_drawn] == list(range(1, ROWS)) and last.pictures is not None
        assert isinstance(engine, BatchDrawingEngine)
        wanted = [("A red car.", "A red car."), ("A red car.", "b"), ("Two dogs, asleep.", "c")]
        texts = [engine.prepare_drawing(*one) for one in wanted]
        together = engine.pictures(texts, 3.0, DRAWING)
        for text, one in zip(texts, together, strict=True):
            assert np.array_equal(engine.pictures([text], 3.0, DRAWING)[0], one)
        # The number 0 of a text is the picture of a query that has the text as its name.
        assert np.array_equal(together[0], last.pictures[0]) and not np.array_equal(together[0], together[1])
        engine.dismiss()
    prompts = [encode_text(query.text, tokenizer, "v1") for query in queries]
    counts = [prompt.count(-200) for prompt in prompts]
    assert [query.length for query in queries] == [
        len(prompt) + (ROWS - 1) * count for prompt, count in zip(prompts, counts, strict=True)
    ]
    has_logits = parallel.pipeline_model_parallel_size == 1
    return Answered(
        prompts,
        [list(answer.tokens) for answer in found],
        [torch.stack(some) for some in zip(*steps[:COUNT], strict=True)] if has_logits else [],
        np.concatenate([last.pictures, together]),
    )


def forward(model: Model, prompts: list[Prompt]) -> list[torch.Tensor]:
    """Runs on a rank: logits [L, W] of whole texts, as training computes them."""
    from megatron_eve.inference.generate import _prompt_batch
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.microbatch import DevicePack, model_inputs
    from tests.inference.test_drawing import loaded

    config = generation_config(model.config, 1, 1)
    with model_parallel(config), torch.no_grad():
        stage = loaded(config, model.run)
        batch = _prompt_batch(prompts, config, apply_exif=True)
        inputs = model_inputs(DevicePack(batch), stage)
        inputs.labels, inputs.output_rows = None, torch.arange(len(batch.tokens))
        rows = stage(inputs)
        return [rows[first:last].clone() for first, last in pairwise(batch.cu_seqlens.tolist())]


@pytest.fixture(scope="module")
def alone(ranks: RankPool, model: Model, images: Path) -> Answered:
    """On one rank."""
    (found,) = ranks.run(1, answered, model, images, ONE)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def trained(model: Model, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dataset of the same questions with its codes, made by the tools."""
    folder = tmp_path_factory.mktemp("data")
    rows: list[dict[str, Any]] = [
        {"image": names, "conversations": turns(text, "Yes.")} for text, names in QUESTIONS
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    made = PreprocessConfig(
        input=str(folder / "rows.json"),
        image_root=str(images),
        tokenizer_model=str(model.tokenizer),
        output_prefix=str(folder / "set"),
        family="vila_u",
        template="v1",
        image_settings={"code_grid": 4},
    )
    run(made)
    threads = torch.get_num_threads()
    words = ["--tower", str(model.tower), "--input", made.output_prefix, "--workers", "1"]
    assert tool("tokenize_images").main(words) == 0
    torch.set_num_threads(threads)
    dataset = open_dataset(made.output_prefix)
    dataset.use_image_settings("vila_u", {"code_grid": 4})
    dataset.use_codes(open_codes(dataset), 4)
    return dataset


def test_prompts_are_training_samples_cut_before_their_answers(
    model: Model, images: Path, alone: Answered, trained: Any
) -> None:
    """Ids and codes.

    The published prompts have no control tokens around pictures, as training has; without these a newline behind a
    picture has a lone "▁" in front.
    """
    from megatron_eve.inference.picture_codes import PictureCodes

    for row, prompt in enumerate(alone.prompts):
        tokens, labels = trained.text(row)
        length = int(np.flatnonzero(labels != -100)[0])
        ours, theirs = (
            [token for token in some if token not in (IM_START, IM_END, *tokenizer_of(model).encode(" "))]
            for some in (prompt, tokens[:length].tolist())
        )
        assert ours == theirs and ours.count(-200) == prompt.count(-200) == len(QUESTIONS[row][1])
        assert len(prompt) == length - ours.count(-200)  # two tokens less and one more for each picture
    codes = PictureCodes(named_tower(model)).codes(files(images, list(SIZES)), True)
    prompts = [
        Prompt(prompt, files(images, names), codes=[codes[list(SIZES).index(name)] for name in names])
        for prompt, (_, names) in zip(alone.prompts, QUESTIONS, strict=True)
    ]
    asked = _Prompts(prompts, generation_config(model.config, 1, 1), apply_exif=True)
    ours, theirs = (
        build_batch(one, range(4), tensor_parallel=1, context_parallel=1, views=[], codes=True)
        for one in (asked, trained)
    )
    assert ours.codes is not None and theirs.codes is not None
    assert ours.codes.shape == (4 * ROWS, 4) and len(ours.codes.unique()) > 10
    assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.image_rows, theirs.image_rows)


def test_codes_are_those_of_the_precision_of_the_data(model: Model, images: Path) -> None:
    from megatron_eve.data.images.squares import square_of
    from megatron_eve.inference.picture_codes import PictureCodes

    squares = [square_of(picture(*size, seed=n), "stretch", 32) for n, size in enumerate(SIZES.values())]
    found = {}
    for dtype in ("float32", "bfloat16"):
        tower = named_tower(model, dtype)
        loaded = find_image_codes("vila_u").load_tower(
            tower.settings, torch.device("cpu"), getattr(torch, dtype)
        )
        expected = loaded.encode(torch.from_numpy(np.stack(squares))).numpy()
        found[dtype] = PictureCodes(tower).codes(files(images, list(SIZES)), True)
        assert all((ours == theirs).all() for ours, theirs in zip(found[dtype], expected, strict=True))
    assert any((a != b).any() for a, b in zip(*found.values(), strict=True))


def test_logits_are_those_of_one_forward_pass(
    ranks: RankPool, model: Model, images: Path, alone: Answered, trained: Any
) -> None:
    """With the codes of the dataset. Another picture gives other logits, and text alone is answered."""
    numbers = iter(range(4))
    prompts = [
        Prompt(
            prompt + answer,
            files(images, names),
            codes=[trained.codes(next(numbers)).astype(np.int64) for _ in names],
        )
        for prompt, answer, (_, names) in zip(alone.prompts, alone.answers, QUESTIONS, strict=True)
    ]
    (whole,) = ranks.run(1, forward, model, prompts)
    for rows, logits in zip(whole, alone.logits, strict=True):
        torch.testing.assert_close(logits, rows[-COUNT - 1 : -1], rtol=0, atol=1e-5)
    assert alone.prompts[0] == alone.prompts[3]
    assert (alone.logits[0] - alone.logits[3])[0, :VOCABULARY].abs().max() > 1e-3


@parametrize(TP2, PP2)
def test_layouts_change_nothing(
    ranks: RankPool, model: Model, images: Path, alone: Answered, layout: Layout
) -> None:
    found, _ = ranks.run(layout.world_size, answered, model, images, layout)
    assert (found.prompts, found.answers) == (alone.prompts, alone.answers)
    assert (found.pictures == alone.pictures).all()
    for logits, expected in zip(found.logits, alone.logits, strict=False):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_what_is_drawn_is_what_the_tool_draws(model: Model, alone: Answered, tmp_path: Path) -> None:
    assert alone.pictures.shape == (2, 32, 32, 3) and (alone.pictures[0] != alone.pictures[1]).any()
    words = ["--prompt", "A red car.", "--num-images", "2", "--output-dir", str(tmp_path)]
    done = command("tools/draw.py", *model.flags, *words)
    assert done.returncode == 0, done.stderr
    for number, pixels in enumerate(alone.pictures):
        with Image.open(tmp_path / f"00000_{number:02d}.png") as drawn:
            assert (np.asarray(drawn) == pixels).all()


Ask = Callable[..., tuple[int, str, list[dict[str, Any]]]]


@pytest.fixture
def ask(model: Model, images: Path, tmp_path: Path) -> Ask:
    """tools/generate.py: exit status, standard error, and rows of answers."""

    def asked(*words: str, pictures: bool = True) -> tuple[int, str, list[dict[str, Any]]]:
        rows = [
            {"question_id": number, "image": names, "text": text}
            for number, (text, names) in enumerate(QUESTIONS)
            if pictures or not names
        ]
        (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        answers = tmp_path / "answers.jsonl"
        answers.unlink(missing_ok=True)
        given = ["--question-file", str(tmp_path / "questions.jsonl"), "--answers-file", str(answers)]
        given += ["--image-folder", str(images), "--max-new-tokens", str(COUNT)]
        done = command("tools/generate.py", *model.flags, *given, *words)
        found = [json.loads(line) for line in answers.read_text().splitlines()] if answers.exists() else []
        return done.returncode, done.stderr, found

    return asked


def test_another_tower_is_refused_before_the_model_is_loaded(
    model: Model, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By each tool, in one sentence."""
    other = write_tower(tmp_path / "other", changed(CONFIG, code_shape=[4, 4, 2]))
    (tmp_path / "questions.jsonl").write_text('{"question_id": 1, "text": "Hi."}\n')
    asking = ["--question-file", str(tmp_path / "questions.jsonl"), "--answers-file", str(tmp_path / "out")]
    for words, says in (
        (["--tower", "/nowhere"], "--tower: /nowhere"),
        (
            ["--tower", str(other)],
            f"--tower {other}: has codes of 4 x 4 x 2, each of 64, and the model's are 4 x 4 x 4, each of 64; name",
        ),
        (["--family", "eve"], "eve"),
    ):
        for name, more in (
            ("generate", asking),
            ("chat", ["--image", str(images / "wide.png")]),
            ("chat", ["--web"]),
        ):
            assert tool(name).main([*model.flags, *more, *words]) == 2
            said = capsys.readouterr().err
            assert said.startswith("error: ") and says in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_tower_that_is_gone_is_needed_for_pictures_alone(ask: Ask, model: Model) -> None:
    moved = model.tower.rename(model.tower.with_name("moved"))
    try:
        status, said, rows = ask()
        assert (status, rows) == (2, []) and said.startswith("error: --tower: ") and said.count("\n") == 1
        status, said, rows = ask(pictures=False)
        assert status == 0 and len(rows) == 1 and "tower_sha256" not in rows[0]["metadata"], said
        status, said, rows = ask("--tower", str(moved))
        assert status == 0 and len(rows) == 4, said
        assert len(rows[0]["metadata"]["tower_sha256"]) == 64
        assert all("error" not in row["metadata"] for row in rows)
    finally:
        moved.rename(model.tower)


def test_a_conversation_in_the_terminal(model: Model, images: Path, tmp_path: Path) -> None:
    """A question about a picture, and a picture that is drawn."""
    done = subprocess.run(
        [
            *(sys.executable, "tools/chat.py", *model.flags, "--image", str(images / "wide.png")),
            *("--max-new-tokens", "4", "--output-dir", str(tmp_path / "drawn")),
        ],
        input="What is shown?\n/draw A red car.\n",
        capture_output=True, text=True, cwd=ROOT, timeout=180, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{tmp_path / 'drawn' / 'picture_00000.png'} (seed 0)"
    with Image.open(tmp_path / "drawn" / "picture_00000.png") as drawn:
        assert drawn.size == (32, 32)


def test_another_tower_of_these_sizes_is_refused_where_the_data_is_known(
    model: Model, trained: Any, tmp_path: Path
) -> None:
    """A run's checkpoints record which tower made the codes of its data, and in which precision."""
    data = replace(
        model.config.data,
        mock_data=False,
        data_path=(str(trained.prefix),),
        tokenizer_model=str(model.tokenizer),
    )
    record = open_datasets(replace(model.config, data=data)).fingerprint
    known = find_tower(Namespace(tower=None), model.config, {"dataset": record})
    assert (known.dtype, known.sha256) == ("float32", named_tower(model).check_weights())
    assert known.check_weights() == known.sha256
    record["code dtypes"] = ["bfloat16"]
    assert find_tower(Namespace(tower=None), model.config, {"dataset": record}).dtype == "bfloat16"
    other = Namespace(tower=write_tower(tmp_path / "other", seed=1), siglip_config=None)
    with pytest.raises(ConfigError, match="is another tower"):
        find_tower(other, model.config, {"dataset": record}).check_weights()
    imported = {"frozen": {"sha256": known.sha256}}  # which has no dataset
    with pytest.raises(ConfigError, match="is another tower"):
        find_tower(other, model.config, imported).check_weights()
    assert find_tower(other, model.config, {}).sha256 is None
    alone = Namespace(tower=None, siglip_config=tmp_path)
    with pytest.raises(ConfigError, match="--siglip-config is of --tower, which is not given; add both"):
        find_tower(alone, model.config, imported)
