"""Where the templates put pictures, what a prompt of each is, and which tokens end an answer."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_eve.data.text.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID, encode_conversation
from megatron_eve.data.text.json_tokenizer import JsonTokenizer
from megatron_eve.data.text.prompts import encode_prompt, prompt_text, stop_ids
from megatron_eve.data.text.templates import (
    find_template,
    missing_control_token,
    prompt_templates,
    templates,
    without_conversation,
)
from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.data.text.turns import ConversationError
from megatron_eve.models.text_format import VICUNA_SYSTEM, VICUNA_V1, RoleFormat, Template
from megatron_eve.models.vila.templates import images_first, images_in_place
from tests.data.helpers import turns
from tests.data.text.test_published_rows import LLAMA_3, QWEN2, VILA15_V1, VILA_V1
from tests.golden_dir import find_golden

CONVERSATIONS = [VICUNA_V1, VILA_V1, VILA15_V1, LLAMA_3, QWEN2]


@pytest.mark.parametrize(
    ("text", "first", "in_place"),
    [
        ("What?", "What?", "What?"),
        ("What is it?\n<image>", "<image>\nWhat is it?", "What is it? <image>"),
        ("<image>\nWhat?", "<image>\nWhat?", "<image>\nWhat?"),
        ("<image>", "<image>", "<image>"),
        # The published code keeps one of two placeholders.
        ("A <image> or <image>?", "<image>\n<image>\nA  or ?", "A <image>\nor <image>\n?"),
        ("<image>\n<image>\nWhat?", "<image>\n<image>\nWhat?", "<image>\n <image>\nWhat?"),
        ("<image><image>", "<image>\n<image>", "<image>\n <image>"),
    ],
)
def test_where_pictures_go(text: str, first: str, in_place: str) -> None:
    assert images_first(text) == first
    assert images_in_place(text).rstrip() == in_place


@given(st.lists(st.text(alphabet="ab \n", max_size=6), min_size=1, max_size=5))
def test_no_picture_gets_lost_on_the_way(parts: list[str]) -> None:
    text = "<image>".join(parts)
    for template in CONVERSATIONS:
        for place in (template.place_images, template.place_in_prompt):
            assert place(text).count("<image>") == len(parts) - 1


def test_pictures_that_no_text_names(tokenizer: Tokenizer) -> None:
    """VILA-1.5 puts them in front of the first question; elsewhere such a row has lost its `<image>`."""
    said = turns("Compare.", "Yes.")
    named = turns("<image>\n<image>\nCompare.", "Yes.")
    assert encode_conversation(said, tokenizer, VILA15_V1, 2) == encode_conversation(
        named, tokenizer, VILA15_V1, 2
    )
    for template in (VICUNA_V1, VILA_V1):
        with pytest.raises(ConversationError, match="image_without_placeholder"):
            encode_conversation(said, tokenizer, template, 2)
    with pytest.raises(ConversationError, match="image_count"):
        encode_conversation(turns("<image>", "Yes."), tokenizer, VILA15_V1, 2)


def test_a_blank_system_turn(tokenizer: Tokenizer) -> None:
    said = turns("Why?", "So.")
    for blank in ("", " \n"):
        row = [{"from": "system", "value": blank}, *said]
        assert encode_conversation(row, tokenizer, VICUNA_V1, 0) == encode_conversation(
            said, tokenizer, VICUNA_V1, 0
        )
        bare = encode_conversation(row, tokenizer, VILA_V1, 0)
        assert tokenizer.decode(bare.tokens) == " USER: Why? ASSISTANT: So."
    own = [{"from": "system", "value": "Be brief."}, *said]
    for template in CONVERSATIONS:
        text = tokenizer.decode(encode_conversation(own, tokenizer, template, 0).tokens)
        assert "Be brief." in text and VICUNA_SYSTEM not in text


@pytest.mark.parametrize("template", CONVERSATIONS, ids=lambda one: one.name)
def test_a_prompt_is_the_beginning_of_its_training_sample(tokenizer: Tokenizer, template: Template) -> None:
    said = turns("<image>\nWhat is it?", "A cat.", "Where?", "", "And why?", "Because.")
    encoded = encode_conversation(said, tokenizer, template, 1)
    prompt = encode_prompt(
        "And why?", tokenizer, template, 1, [("What is it?", "A cat."), ("Where?", " \u200b")]
    )
    assert encoded.tokens[: len(prompt)] == prompt
    rest = encoded.labels[len(prompt) :]
    trained = [label for label in rest if label != IGNORE_INDEX]
    assert tokenizer.decode(trained).startswith("Because.") and rest[0] == trained[0]
    assert template.answer is not None
    end = template.answer.after
    assert trained[-1] == 2 if end == "</s>" else tokenizer.decode(trained).endswith(end)


@pytest.mark.parametrize("template", CONVERSATIONS, ids=lambda one: one.name)
def test_several_pictures_anywhere_in_a_prompt(tokenizer: Tokenizer, template: Template) -> None:
    question = "Is <image> older than <image>?"
    text = prompt_text(question, template, 2)
    place, other = (at for at in range(len(text)) if text.startswith("<image>", at))
    assert text[:place].rstrip().endswith("Is") and text[place:other].rstrip().endswith("older than")
    assert encode_prompt(question, tokenizer, template, 2).count(IMAGE_TOKEN_ID) == 2
    later = prompt_text("And <image>?", template, 3, [(question, "Yes.")])
    assert later.count("<image>") == 3
    with pytest.raises(ConversationError, match="image_count"):
        prompt_text(question, template, 3)


def test_prompts_in_full() -> None:
    assert prompt_text("Why?", LLAMA_3, 0, [("What?", "A.")], system="Be brief.") == (
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|end_of_text|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat?<|end_of_text|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA.<|end_of_text|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|end_of_text|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert prompt_text(" Why? ", QWEN2, 1) == (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        "<|im_start|>user\n<image>\n Why?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt_text("Why?", VILA_V1, 0, system="") == " USER: Why? ASSISTANT:"


def test_tokens_that_end_an_answer(tokenizer: Tokenizer) -> None:
    assert stop_ids(tokenizer, "vicuna_v1") == stop_ids(tokenizer, VILA_V1) == {2}
    # What the tokenizer lacks ends nothing.
    assert stop_ids(tokenizer, LLAMA_3) == {2}
    assert stop_ids(tokenizer, "plain") == {2, tokenizer.encode("\n")[-1]}
    folder = find_golden("golden/vila/vila_main_embed")
    special = json.loads((folder / "meta.json").read_text())["special"]
    found = stop_ids(JsonTokenizer(folder / "model/llm/tokenizer.json"), QWEN2)
    assert found == {special["eos"], special["pad"]}


def test_templates_by_name(tokenizer: Tokenizer) -> None:
    assert list(templates())[:3] == ["plain", "vicuna_v1", "document"]
    assert prompt_templates()[:2] == ("plain", "vicuna_v1") and "document" not in prompt_templates()
    assert find_template("vicuna_v1") is VICUNA_V1
    assert without_conversation("document") == "documents" and not without_conversation("vicuna_v1")
    assert not without_conversation("of a family that is not here")
    assert missing_control_token("vicuna_v1", tokenizer.encode) is None
    assert missing_control_token("plain", tokenizer.encode) is None
    assert RoleFormat("a:").after == ""
