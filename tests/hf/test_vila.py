"""VILA for transformers: its own LLaVA for mlp2x_gelu computes and generates what ours does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert.vila_folders import llava
from tests.hf.vila_models import QUESTIONS, config_of, exported, our_prompts, ours, their_inputs
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

# Tower, language model, and how pictures become squares.
MODELS = [("clip", "llama", "pad"), ("siglip", "qwen2", "stretch"), ("clip", "llama", "crop")]
COUNT = 8


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder that ours reads, and one for transformers."""
    tower, language, fit = request.param
    folder = tmp_path_factory.mktemp(fit)
    # Weights of a size at which the likeliest of the next tokens is clear; as many as the tokenizer has pieces.
    sizes = {"vocab_size": 384, "initializer_range": 0.2}
    source = llava(folder / "source", tower, language, sizes, image_fit=fit)
    return source, exported(folder, source)


def assert_close(theirs: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest logit."""
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_transformers_computes_what_ours_does(ranks: RankPool, model: tuple[Path, Path]) -> None:
    """Logits and greedy ids of prompts with none, one and two pictures, alone and in a batch; eager and SDPA."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    source, folder = model
    assert not list(folder.glob("*.py")), "transformers' own class: no code of ours"
    (found,) = ranks.run(1, ours, config_of(source), source, our_prompts("vila_v1"), COUNT)
    logits, answers = found
    assert len({tuple(answer) for answer in answers}) == len(QUESTIONS), "the pictures are looked at"
    processor = AutoProcessor.from_pretrained(folder)
    for attention in ("eager", "sdpa"):
        theirs: Any = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation=attention)
        rows = theirs.config.text_config.vocab_size
        assert rows == 385, "one row more, for <image>"
        for numbers in ([0], [1], [2], [0, 1, 2]):
            inputs = their_inputs(processor, numbers)
            with torch.no_grad():
                batch = theirs(**inputs).logits
            for number, row, mask in zip(numbers, batch, inputs["attention_mask"].bool(), strict=True):
                assert_close(row[mask][:, :384], logits[number])
            new = theirs.generate(**inputs, max_new_tokens=COUNT, eos_token_id=None)[
                :, inputs["input_ids"].shape[1] :
            ]
            assert new.tolist() == [answers[number] for number in numbers]


def test_no_answer_holds_the_image_token(model: tuple[Path, Path]) -> None:
    """Its score is 0, which is the highest where all others are negative."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    theirs: Any = LlavaForConditionalGeneration.from_pretrained(model[1])
    theirs.lm_head.weight.data[:384] = 0
    theirs.lm_head.bias = torch.nn.Parameter(torch.tensor([-1.0] * 384 + [0.0]))
    inputs = their_inputs(AutoProcessor.from_pretrained(model[1]), [1])
    new = theirs.generate(**inputs, max_new_tokens=3)[:, inputs["input_ids"].shape[1] :]
    assert (new < 384).all()
