"""What ends an answer: limits and stop texts of each query in one batch; several pictures at their places."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_eve.data.text.conversation import IMAGE_TOKEN_ID
from megatron_eve.data.text.prompts import prompt_text
from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.inference.engine import Answer, AnswerEnd, Engine, TextPieces, cut_at_stop
from tests.golden_dir import find_golden
from tests.inference.test_engines import PROMPTS, on_ranks
from tests.inference.test_generate import answers as generated
from tests.inference.test_generate import config_of, picture
from tests.layouts import ONE, TP2, Layout, parametrize
from tests.ranks import RankPool

LONGEST = 24


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(find_golden("tokenize") / "tokenizer.model")


def ends_after(tokens: list[int], stop: tuple[str, ...], tokenizer: Tokenizer) -> int:
    """Tokens until the text holds a stop text, by decoding everything again."""
    for count in range(1, len(tokens) + 1):
        if any(one in tokenizer.decode(tokens[:count]) for one in stop):
            return count
    return len(tokens)


@given(
    st.text("ab \n猫🙂é.", max_size=30),
    st.lists(st.text("ab \n猫🙂.", min_size=1, max_size=3), max_size=2),
    st.integers(0, 30),
)
def test_an_answer_ends_with_the_token_that_completes_a_stop_text(
    text: str, stop: list[str], start: int
) -> None:
    stop = [*stop, text[start : start + 12]]  # long ones reach over several tokens; an empty one ends nothing
    tokenizer = Tokenizer(find_golden("tokenize") / "tokenizer.model")
    tokens = tokenizer.encode(text)
    end = AnswerEnd(tokenizer.decode, 1000, stop)
    count = next((n for n, token in enumerate(tokens, 1) if end.add(token)), len(tokens))
    assert count == ends_after(tokens, tuple(filter(None, stop)), tokenizer)
    whole = cut_at_stop(tokenizer.decode(tokens[:count]), stop).strip()
    pieces = TextPieces(tokenizer.decode, stop)
    assert "".join([*(pieces.add(token) for token in tokens[:count]), pieces.rest()]) == whole


def test_a_token_is_decoded_a_few_times_at_any_length(tokenizer: Tokenizer) -> None:
    decoded = 0

    def decode(tokens: list[int]) -> str:
        nonlocal decoded
        decoded += len(tokens)
        return tokenizer.decode(tokens)

    tokens = tokenizer.encode("A cat and a 猫. " * 300)[:1024]
    end = AnswerEnd(decode, 2000, ["\n\n", "Question:"])
    assert not any(end.add(token) for token in tokens)
    assert decoded < 8 * len(tokens)
    assert [AnswerEnd(decode, 2, ()).add(5), AnswerEnd(decode, 1, ()).add(5)] == [False, True]


def test_a_text_is_cut_as_the_models_of_lm_eval_cut_it() -> None:
    huggingface = pytest.importorskip("lm_eval.models.utils")
    for text in ("", "a", "a\n\nb\nc", "Q: a Q:", "\n\nanswer", "abX Yz"):
        for stop in ([], ["\n\n"], ["Q:", "\n"], ["", "b"], ["X", "bX"], ["bX", "X"]):
            theirs = huggingface.postprocess_generated_text(text, stop, None)
            assert cut_at_stop(text, stop) == theirs, (text, stop)


Asked = list[tuple[int, tuple[str, ...]]]


def answered(engine: Engine, asked: Asked) -> tuple[list[Answer], list[Answer], list[str]]:
    """Of PROMPTS with these limits and stop texts: in one batch, alone, streamed."""
    queries = [
        engine.prepare(text, images, *ends) for (text, images), ends in zip(PROMPTS, asked, strict=True)
    ]
    alone = [engine.answers([query])[0] for query in queries]
    return engine.answers(queries), alone, ["".join(engine.stream(query)) for query in queries]


def parts(answers: list[Answer]) -> Asked:
    """For each answer a limit and stop texts: the first goes on, others end in the middle or by their limits."""
    asked: Asked = [(LONGEST, ())]
    for number, answer in enumerate(answers[1:]):
        text, middle = answer.text, len(answer.text) // 2
        asked.append(
            (3 + number, ("never",) * (number == 3))
            if number % 2
            else (LONGEST, ("never", text[middle : middle + 3]))
        )
    return asked


@pytest.fixture(scope="module")
def whole(ranks: RankPool) -> list[Answer]:
    asked: Asked = [(LONGEST, ())] * len(PROMPTS)
    (found,) = ranks.run(1, on_ranks, ONE, partial(answered, asked=asked))
    assert found[0] == found[1]
    return found[0]


def check(
    found: tuple[list[Answer], list[Answer], list[str]], whole: list[Answer], tokenizer: Tokenizer
) -> None:
    together, alone, streamed = found
    assert together == alone and streamed == [answer.text for answer in alone]
    for answer, longer, (limit, stop) in zip(together, whole, parts(whole), strict=True):
        tokens = list(longer.tokens)
        count = min(limit, ends_after(tokens, stop, tokenizer))
        assert list(answer.tokens) == tokens[:count]
        assert answer.text == cut_at_stop(tokenizer.decode(tokens[:count]), stop).strip()
    assert len({len(answer.tokens) for answer in together}) > 2


@pytest.mark.distributed
@parametrize(ONE, TP2)
def test_each_query_of_a_batch_ends_by_itself(
    ranks: RankPool, whole: list[Answer], tokenizer: Tokenizer, layout: Layout
) -> None:
    found, *_ = ranks.run(layout.world_size, on_ranks, layout, partial(answered, asked=parts(whole)))
    check(found, whole, tokenizer)


@pytest.mark.distributed
def test_transformers_ends_the_same_answers_there(
    exported: Path, whole: list[Answer], tokenizer: Tokenizer
) -> None:
    from megatron_eve.inference.hf_engine import HFEngine

    check(answered(HFEngine(exported, "vicuna_v1"), parts(whole)), whole, tokenizer)


def four_shots() -> tuple[str, list[bytes]]:
    """Question, picture, answer, four times, and a fifth question with its picture in the middle."""
    shots = [
        ("<image>\nWhat?", "A cat."),
        ("Look: <image> Who?", "Me."),
        ("<image>\nSo?", "Yes."),
        ("<image> ?", "4"),
    ]
    text = prompt_text("And <image> here?", "vicuna_v1", 5, shots)
    return text, [picture(30 + 12 * n, 90 - 9 * n) for n in range(5)]


def shots_answered(engine: Engine) -> tuple[list[Answer], list[Answer]]:
    """With the pictures in order and in another one, as PNG; then the first as PPM."""
    text, images = four_shots()
    portable = []
    for data in images:
        stream = io.BytesIO()
        Image.open(io.BytesIO(data)).save(stream, "PPM")
        assert stream.getvalue().startswith(b"P6")
        portable.append(stream.getvalue())
    queries = [engine.prepare(text, some, 12) for some in (images, images[::-1], portable)]
    return engine.answers(queries[:2]), engine.answers(queries[2:])


@pytest.mark.distributed
def test_pictures_of_four_shots_stand_at_their_places(
    ranks: RankPool, exported: Path, tokenizer: Tokenizer
) -> None:
    from megatron_eve.inference.generate import Prompt
    from megatron_eve.inference.hf_engine import HFEngine

    text, images = four_shots()
    pieces = [tokenizer.encode(piece) for piece in text.split("<image>")]
    tokens = [1, *pieces[0]]
    for piece in pieces[1:]:
        tokens += [IMAGE_TOKEN_ID, *piece]
    prompts = [Prompt(tokens, images), Prompt(tokens, images[::-1])]
    (expected,) = ranks.run(1, generated, config_of(ONE), prompts, 12, (tokenizer.eos_id,))
    (found,) = ranks.run(1, on_ranks, ONE, shots_answered)
    assert [list(answer.tokens) for answer in found[0]] == expected and expected[0] != expected[1]
    assert found[1] == found[0][:1], "PPM is the same picture as PNG"
    assert shots_answered(HFEngine(exported, "vicuna_v1")) == found
