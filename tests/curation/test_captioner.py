"""Captions are the model's, whatever the batch; a row that fails is one row, and a server that is down no answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.curation import captioner
from megatron_eve.curation.caption_answers import CaptionAnswer, CaptionAnswers
from megatron_eve.curation.captioner import Captioner, Picture
from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.text.turns import Turn
from megatron_eve.inference.engine import PromptError
from megatron_eve.inference.http_client import HTTPClient, ServerError
from megatron_eve.inference.http_engine import HTTPEngine
from megatron_eve.inference.sampling import GREEDY, Sampling
from megatron_eve.inference.transformers_engine import TransformersEngine
from tests.inference.baseline_models import make_llava
from tests.inference.openai_server import Served, serving
from tests.inference.test_baselines import picture

COUNT = 8
PROMPTS = ("What is it?", "Describe the picture, with all that is on it.", "Generate a coco-style caption.")
PICTURES = [
    Picture(row, PROMPTS[row % 3], picture(20 + 3 * row, 40 - row, row, ("PNG", "JPEG")[row % 2]))
    for row in range(10)
]
DAMAGED = Picture(10, PROMPTS[0], PICTURES[0].data[:200] if PICTURES[0].data else None)
NOT_ASKED = Picture(11, PROMPTS[0], None)
UNREADABLE = Picture(12, PROMPTS[0], None, SkipRow("parquet_row", "torn"))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    return TransformersEngine(make_llava(tmp_path_factory.mktemp("captioner")))


def captions(
    engine: Any, path: Path, pictures: list[Picture], batch_size: int, sampling: Sampling = GREEDY
) -> list[CaptionAnswer]:
    """The answers to pictures, those that the file has already taken from it."""
    with CaptionAnswers(path, [one.row for one in pictures], batch_size) as answers:
        rest = [one for one in pictures if one.row in answers.missing]
        Captioner(engine, COUNT, sampling).fill(answers, rest, batch_size)
        return answers.found


def alone(engine: TransformersEngine, one: Picture, sampling: Sampling = GREEDY) -> CaptionAnswer:
    assert one.data is not None
    text = engine.prompt([Turn("human", one.prompt)], 1)
    (answer,) = engine.answers([engine.prepare(text, [one.data], COUNT)], sampling)
    return CaptionAnswer(one.row, one.prompt, answer.text)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_k=20, seed=3)])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_captions_are_those_of_each_picture_alone(
    engine: TransformersEngine, tmp_path: Path, batch_size: int, sampling: Sampling
) -> None:
    wanted = [alone(engine, one, sampling) for one in PICTURES]
    assert len({answer.caption for answer in wanted}) == len(wanted)
    assert captions(engine, tmp_path / "a.jsonl", PICTURES, batch_size, sampling) == wanted


def test_rows_without_a_caption_have_their_reason(engine: TransformersEngine, tmp_path: Path) -> None:
    found = captions(engine, tmp_path / "a.jsonl", [DAMAGED, *PICTURES[:2], NOT_ASKED, UNREADABLE], 3)
    assert (found[0].row, found[0].reason, found[0].caption) == (10, "image_damaged", None)
    assert found[1:3] == [alone(engine, one) for one in PICTURES[:2]]
    assert found[3:] == [CaptionAnswer(11), CaptionAnswer(12, reason="parquet_row", detail="torn")]


def test_a_prompt_that_is_too_long_for_the_model(engine: TransformersEngine, tmp_path: Path) -> None:
    assert PICTURES[0].data
    (found,) = captions(engine, tmp_path / "a.jsonl", [Picture(0, "see " * 1200, PICTURES[0].data)], 4)
    assert found.reason == "prompt_too_long"


def test_a_prompt_that_no_row_could_have(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prompt(turns: object, images: int) -> str:
        raise PromptError("image_count", "images: 1, places for them in the text: 0")

    monkeypatch.setattr(engine, "prompt", prompt)
    with pytest.raises(DataError, match=r"takes no prompt with one picture \(image_count: images: 1, places"):
        captions(engine, tmp_path / "a.jsonl", PICTURES, 4)


class Failing(Served):
    """A server that fails on each question with a word of `words` in it."""

    words: tuple[str, ...] = ()

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if any(word in str(body["messages"]) for word in self.words):
            return 500, {"error": {"message": "CUDA error"}}
        return super().reply(path, body)


@pytest.fixture
def server(engine: TransformersEngine) -> Iterator[tuple[HTTPEngine, Failing]]:
    with serving(Failing(engine)) as (url, served):
        assert isinstance(served, Failing)
        yield HTTPEngine(url, "tiny", client=HTTPClient(url, first_wait=0.001)), served


def test_captions_of_a_server(
    engine: TransformersEngine, server: tuple[HTTPEngine, Failing], tmp_path: Path
) -> None:
    remote, served = server
    wanted = captions(engine, tmp_path / "a.jsonl", [*PICTURES, DAMAGED, NOT_ASKED], 4)
    assert captions(remote, tmp_path / "b.jsonl", [*PICTURES, DAMAGED, NOT_ASKED], 4) == wanted
    assert served.most_at_once > 1


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_row_that_the_server_fails_on_is_one_row(
    engine: TransformersEngine, server: tuple[HTTPEngine, Failing], tmp_path: Path, batch_size: int
) -> None:
    remote, served = server
    served.words = ("Generate",)  # rows 2 and 5, the last
    found = captions(remote, tmp_path / "a.jsonl", PICTURES[:6], batch_size)
    assert [one.row for one in found] == list(range(6))
    for one, answer in zip(PICTURES, found, strict=False):
        if one.row % 3 == 2:
            assert (answer.reason, answer.caption, answer.prompt) == ("server_error", None, PROMPTS[2])
            assert "no answer after 6 tries (status 500: CUDA error)" in (answer.detail or "")
        else:
            assert answer == alone(engine, one)


def test_a_server_that_fails_on_everything_ends_the_shard_and_is_continued(
    engine: TransformersEngine,
    server: tuple[HTTPEngine, Failing],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remote, served = server
    monkeypatch.setattr(captioner, "MOST_FAILED", 3)
    path = tmp_path / "a.jsonl"
    assert len(captions(remote, path, PICTURES[:4], 2)) == 4
    served.words = ("e",)
    with pytest.raises(ServerError, match=r"no answer after 6 tries \(status 500: CUDA error\)"):
        captions(remote, path, PICTURES, 2)
    assert path.read_bytes().count(b"\n") == 4
    served.words = ()
    assert captions(remote, path, PICTURES, 2) == [alone(engine, one) for one in PICTURES]


def test_a_server_that_is_gone_at_the_last_rows_ends_the_shard(
    server: tuple[HTTPEngine, Failing], tmp_path: Path
) -> None:
    remote, served = server
    path = tmp_path / "a.jsonl"
    captions(remote, path, PICTURES[:4], 4)
    served.words, served.models = ("e",), [{"id": "another"}]
    with pytest.raises(ServerError, match="serves no such model, but another"):
        captions(remote, path, PICTURES[:6], 4)
    assert path.read_bytes().count(b"\n") == 4
