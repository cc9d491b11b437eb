"""Log-likelihoods: transformers' own log_softmax under every layout, greedy as answers are, rows shared or not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from megatron_eve.data.text.prompts import prompt_text
from megatron_eve.inference.engine import ContinuationQuery, Engine, LogLikelihood, PromptError
from tests.golden_dir import find_golden
from tests.inference.test_engines import on_ranks
from tests.inference.test_generate import picture
from tests.layouts import ONE, PP2, TP2, TP2_PP2, Layout, parametrize
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

PAIRS, BATCH, TOLERANCE = 200, 25, 1e-4


class Case(NamedTuple):
    """A context, its pictures, a continuation."""

    text: str
    images: list[bytes]
    continuation: str


def random_cases() -> list[Case]:
    """Texts of 1 to 60 tokens; contexts that are prompts, raw texts, empty; four continuations of some of them."""
    from megatron_eve.data.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(find_golden("tokenize") / "tokenizer.model")
    random = np.random.default_rng(22)

    def words(most: int) -> str:
        count = int(random.integers(1, most + 1))
        text = tokenizer.decode(random.integers(259, tokenizer.vocab_size, count).tolist())
        return text.strip() or "a"

    cases: list[Case] = []
    while len(cases) < PAIRS:
        images = [picture(*random.integers(30, 100, 2).tolist()) for _ in range(random.integers(0, 3))]
        kind = random.integers(0, 4)
        if kind == 0:
            cases += [Case(prompt_text(words(20), "vicuna_v1", len(images)), images, f" {words(60)}")]
        elif kind == 1:
            cases += [Case("" if not images else "<image>" * len(images), images, words(60))]
        elif kind == 2:
            text = "".join(f"{words(9)} <image>\n" for _ in images) + words(30)
            cases += [Case(f"{text} \n", images, f"{words(60)}\n")]
        else:  # answers of one token, and longer ones, to a question
            text = prompt_text(words(20), "vicuna_v1", len(images))
            cases += [Case(text, images, f" {end}") for end in ("a", "b", "c", f"a {words(5)}")]
    # Cut inside words, so that a token of the whole spans the cut.
    for number, images in enumerate(([], [picture(40, 60)])):
        whole = f"{'<image>' * len(images)}A chat: USER: What is it? ASSISTANT: a cat, and the assistant."
        cases[8 * number : 8 * number + 8] = [
            Case(whole[:at], images, whole[at:]) for at in range(len(whole) - 33, len(whole) - 17, 2)
        ]
    return cases[:PAIRS]


def found_by(engine: Engine, cases: Sequence[Case], batch: int = BATCH) -> list[LogLikelihood]:
    """In batches."""
    queries = [engine.prepare_continuation(*case) for case in cases]
    found: list[LogLikelihood] = []
    for start in range(0, len(queries), batch):
        found += engine.log_likelihoods(queries[start : start + batch])
    return found


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return random_cases()


@pytest.fixture(scope="module")
def expected(exported: Path, cases: list[Case]) -> list[LogLikelihood]:
    """From transformers' model called directly, pair by pair."""
    import io

    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import megatron_eve.hf  # noqa: F401 - registers the models

    processor = AutoProcessor.from_pretrained(exported)
    model = AutoModelForImageTextToText.from_pretrained(exported).eval()
    found, counts = [], set()
    for text, images, continuation in cases:
        pictures = [Image.open(io.BytesIO(data)) for data in images]
        context = text.rstrip()
        inputs = processor(text=[context], images=[pictures] if pictures else None, return_tensors="pt")
        ids = processor.tokenizer(text + continuation)["input_ids"]
        wanted = torch.tensor(ids[len(processor.tokenizer(context)["input_ids"]) :])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], wanted[None]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        count = len(wanted)
        with torch.no_grad():
            logits = model(**inputs).logits[0, -count - 1 : -1].float()
        found.append(
            LogLikelihood(
                logits.log_softmax(-1).gather(-1, wanted[:, None]).sum().item(),
                bool((logits.argmax(-1) == wanted).all()),
            )
        )
        counts.add(count)
    assert {1, 60} <= counts, "short and long continuations"
    return found


def check(found: list[LogLikelihood], expected: list[LogLikelihood]) -> None:
    differences = [abs(ours.sum - theirs.sum) for ours, theirs in zip(found, expected, strict=True)]
    assert max(differences) < TOLERANCE, max(differences)
    assert [one.is_greedy for one in found] == [one.is_greedy for one in expected]


@parametrize(ONE, PP2, slow=(TP2, TP2_PP2))
def test_they_are_those_of_transformers_under_every_layout(
    ranks: RankPool, cases: list[Case], expected: list[LogLikelihood], layout: Layout
) -> None:
    found, *_ = ranks.run(layout.world_size, on_ranks, layout, partial(found_by, cases=cases))
    check(found, expected)


def test_the_engine_over_transformers_finds_them_in_batches(
    exported: Path, cases: list[Case], expected: list[LogLikelihood]
) -> None:
    from megatron_eve.inference.hf_engine import HFEngine

    check(found_by(HFEngine(exported, "vicuna_v1"), cases), expected)


class Greedy(NamedTuple):
    """What an engine says of continuations beside its answers."""

    agree: list[tuple[bool, bool]]
    passes: int
    alone: list[LogLikelihood]
    together: list[LogLikelihood]


def beside_answers(engine: Engine) -> Greedy:
    """Of each of many prompts and each of some texts of one token, is it greedy, and is it the answer? Then passes."""
    from megatron_eve.data.text.tokenizer import Tokenizer
    from megatron_eve.inference import megatron_engine

    tokenizer = Tokenizer(find_golden("tokenize") / "tokenizer.model")
    prompts = [tokenizer.decode([259 + n]) + " of a" for n in range(40)]
    answers = engine.answers([engine.prepare(text, [], 1) for text in prompts])
    agree = []
    for text, answer in zip(prompts, answers, strict=True):
        whole = [*tokenizer.encode(text), *answer.tokens]
        for ending in {tokenizer.decode(whole).removeprefix(text), " a", "s"} - {""}:
            found = tokenizer.encode(text + ending)
            if len(found) == len(whole) and found[:-1] == whole[:-1]:
                query = engine.prepare_continuation(text, [], ending)
                (said,) = engine.log_likelihoods([query])
                agree.append((said.is_greedy, found[-1] == whole[-1]))
    counted: list[int] = []
    computed = megatron_engine.packed_log_probabilities

    def counting(model: object, passes: megatron_engine.Passes, *more: object) -> object:
        counted.append(len(passes.prompts))
        return computed(model, passes, *more)  # type: ignore[arg-type]

    megatron_engine.packed_log_probabilities = counting  # type: ignore[assignment]
    try:
        context, images = prompt_text("Which?", "vicuna_v1", 1), [picture(90, 60)]
        queries: list[ContinuationQuery] = [
            engine.prepare_continuation(context, images, f" {letter}") for letter in "abc"
        ]
        queries.append(engine.prepare_continuation(context, [picture(60, 90)], " a"))
        # The same tokens, of which two belong to the continuation here and one there.
        queries.append(engine.prepare_continuation(f"{context} a", images, " b"))
        queries.append(engine.prepare_continuation(context, images, " a b"))
        together = engine.log_likelihoods(queries)
        passes = sum(counted)
        alone = [engine.log_likelihoods([query])[0] for query in queries]
    finally:
        megatron_engine.packed_log_probabilities = computed
    return Greedy(agree, passes, alone, together)


def test_greedy_is_what_answers_say_and_shared_rows_change_nothing(ranks: RankPool) -> None:
    (found,) = ranks.run(1, on_ranks, ONE, beside_answers)
    assert all(is_greedy == is_answer for is_greedy, is_answer in found.agree)
    assert {one for one, _ in found.agree} == {True, False}
    assert found.passes == 3, "continuations of one context share a pass, another picture has its own"
    assert len({one.sum for one in found.together}) == 6
    first, *_, second, both = found.together
    assert both.sum == pytest.approx(first.sum + second.sum, abs=1e-5)
    for together, alone in zip(found.together, found.alone, strict=True):
        assert together.sum == pytest.approx(alone.sum, abs=1e-5) and together.is_greedy == alone.is_greedy


def test_a_continuation_is_greedy_if_each_of_its_tokens_is() -> None:
    import torch

    from megatron_eve.inference.log_likelihoods import summed

    found = torch.tensor([[-1.0, 1.0], [-2.0, 0.0], [-3.0, 1.0]])
    assert summed(found, [0, 1, 1], 2) == [LogLikelihood(-1.0, True), LogLikelihood(-5.0, False)]


def refusals(engine: Engine) -> list[str]:
    """What `prepare_continuation`, and `prepare` for the last one, say of texts that they do not take."""
    found = []
    for text, continuation in (
        ("Hi.", ""),
        ("Hi.", " an <image>"),
        ("Hi. \ud83d", " a"),
        ("Hi.", " \ude00"),
        ("An <image> tag in HTML", " a"),
        ("word " * 700, " word" * 2000),
    ):
        with pytest.raises(PromptError) as error:
            engine.prepare_continuation(text, [], continuation)
        found.append(error.value.reason)
    with pytest.raises(PromptError) as error:
        engine.prepare("An <image> tag in HTML", [], 8)
    return [*found, error.value.reason, str(error.value)]


def test_what_a_context_and_its_continuation_may_not_be(ranks: RankPool, exported: Path) -> None:
    from megatron_eve.inference.hf_engine import HFEngine

    (found,) = ranks.run(1, on_ranks, ONE, refusals)
    assert found[:-1] == [
        "no_continuation",
        "image_in_continuation",
        "half_character",
        "half_character",
        "image_count",
        "prompt_too_long",
        "image_count",
    ]
    assert "the text holds 1 <image> and 0 pictures came with it" in found[-1]
    assert refusals(HFEngine(exported, "vicuna_v1")) == found


def test_the_model_of_lm_eval_finds_the_same(exported: Path, cases: list[Case]) -> None:
    """Its tokens are ours: contexts that end in white space or are empty among them."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    from megatron_eve.inference.hf_engine import HFEngine

    engine = HFEngine(exported, "vicuna_v1")
    texts = [case for case in cases if not case.images]
    assert any(not case.text for case in texts) and any(case.text.endswith("\n") for case in texts)
    theirs = huggingface.HFLM(
        pretrained=engine._model, tokenizer=engine._processor.tokenizer, batch_size=8, device="cpu"
    )
    asked = [
        Instance("loglikelihood", {}, (case.text, case.continuation), number)
        for number, case in enumerate(texts)
    ]
    # One by one: of requests with the same tokens but for the last, lm-eval 0.4.13 takes the first one's cut for all.
    expected = [LogLikelihood(*theirs.loglikelihood([one], disable_tqdm=True)[0]) for one in asked]
    check(found_by(engine, texts), expected)
