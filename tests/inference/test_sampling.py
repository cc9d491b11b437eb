"""Tokens are drawn from the right distribution, and alike under any layout, in any batch and by either engine."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from megatron_eve.config import ConfigError
from megatron_eve.inference.engine import Answer, Engine
from megatron_eve.inference.sampling import GREEDY, Sampling, add_sampling_flags, next_tokens, sampling_of
from tests.inference.test_engines import COUNT, PROMPTS, on_ranks
from tests.layouts import ONE, TP2, TP2_PP2, Layout, parametrize
from tests.ranks import RankPool

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, -torch.inf])


def shares(sampling: Sampling, count: int = 4000) -> torch.Tensor:
    """How often each token is drawn, with as many keys."""
    keys = [sampling.key(f"prompt {number}", []) for number in range(count)]
    drawn = next_tokens(LOGITS.expand(count, -1), sampling, keys, 0)
    return torch.bincount(drawn, minlength=len(LOGITS)).double() / count


def test_tokens_are_drawn_with_their_probabilities() -> None:
    for temperature in (0.5, 1.0, 2.0):
        wanted = (LOGITS.double() / temperature).softmax(-1)
        assert (shares(Sampling(temperature)) - wanted).abs().max() < 0.03  # four times the standard error
    two = (LOGITS[[1, 3]].double()).softmax(-1)
    found = shares(Sampling(1.0, top_k=2))
    assert found[[0, 2, 4]].tolist() == [0, 0, 0] and (found[[1, 3]] - two).abs().max() < 0.03
    # Their probabilities are 0.59, 0.22, 0.13 and 0.03: the first two are the fewest that add up to 0.7.
    assert torch.equal(shares(Sampling(1.0, top_p=0.7)), found)
    for certain in (GREEDY, Sampling(1.0, top_k=1), Sampling(1.0, top_p=0.01), Sampling(0.01)):
        assert shares(certain, 50)[1] == 1


def test_a_row_draws_by_its_key_and_step_alone() -> None:
    sampling = Sampling(5.0, seed=3)
    logits = torch.linspace(0, 1, 600).reshape(3, 200).sin()
    keys = [sampling.key("a", []), sampling.key("b", [b"x"]), sampling.key("b", [b"y"])]
    assert len({*keys, Sampling(5.0, seed=4).key("a", [])}) == 4
    together = [next_tokens(logits, sampling, keys, step) for step in range(20)]
    assert len({tuple(some.tolist()) for some in together}) > 15
    for step, some in enumerate(together):
        for row in range(3):
            alone = next_tokens(logits[row : row + 1], sampling, keys[row : row + 1], step)
            assert alone.item() == some[row]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--temperature -1", "--temperature -1.0: must lie between 0"),
        ("--temperature nan", "--temperature nan: must lie between 0"),
        ("--temperature 1 --top-p 0", "--top-p 0.0: must lie above 0"),
        ("--temperature 1 --top-k -5", "--top-k -5: must be 0"),
        ("--temperature 1 --seed -5", "--seed -5: must be 0 or more"),
        ("--top-p 0.9", "--top-p: has no effect without --temperature above 0"),
    ],
)
def test_flags_that_cannot_be(words: str, message: str) -> None:
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser.add_argument_group())
    with pytest.raises(ConfigError, match=message):
        sampling_of(parser.parse_args(words.split()))
    assert sampling_of(parser.parse_args([])) == GREEDY
    given = parser.parse_args(["--temperature", "0.7", "--top-p", "0.9", "--top-k", "40", "--seed", "3"])
    assert sampling_of(given) == Sampling(0.7, 40, 0.9, 3)


SAMPLING = Sampling(temperature=3.0, top_p=0.98, seed=5)


def sampled(engine: Engine) -> tuple[list[Answer], list[str], list[Answer], list[Answer]]:
    """A batch, each prompt streamed, a batch with another seed, and a greedy one."""
    queries = [engine.prepare(text, images, COUNT) for text, images in PROMPTS[:3]]
    streamed = ["".join(engine.stream(query, SAMPLING)) for query in queries]
    others = [engine.answers(queries, one) for one in (SAMPLING, Sampling(3.0, seed=6), GREEDY)]
    return others[0], streamed, others[1], others[2]


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> list[Answer]:
    (found,) = ranks.run(1, on_ranks, ONE, sampled)
    batch, streamed, other_seed, greedy = found
    assert streamed == [answer.text for answer in batch]
    for one, other, likely in zip(batch, other_seed, greedy, strict=True):
        assert one.tokens != other.tokens != likely.tokens != one.tokens
    return list(batch)


@pytest.mark.distributed
@parametrize(TP2_PP2, slow=(TP2,))
def test_the_same_seed_gives_the_same_text_on_several_ranks(
    ranks: RankPool, alone: list[Answer], layout: Layout
) -> None:
    found = ranks.run(layout.world_size, on_ranks, layout, sampled)[0]
    assert found[0] == alone and found[1] == [answer.text for answer in alone]


@pytest.mark.distributed
def test_transformers_draws_the_same(ranks: RankPool, alone: list[Answer], exported: Path) -> None:
    from megatron_eve.inference.hf_engine import HFEngine

    batch, streamed, _, _ = sampled(HFEngine(exported, "vicuna_v1"))
    assert batch == alone and streamed == [answer.text for answer in alone]
