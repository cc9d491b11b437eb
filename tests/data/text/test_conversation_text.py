"""Texts that are not what they seem: answers in which nothing shows, and placeholders of other models."""

from __future__ import annotations

import pytest

from megatron_eve.data.text.conversation import encode_conversation
from megatron_eve.data.text.prompts import encode_prompt
from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.data.text.turns import ConversationError, is_blank
from tests.data.helpers import turns


@pytest.mark.parametrize(
    ("text", "blank"),
    [
        ("", True),
        (" \n\t\r", True),
        ("\u200b", True),  # zero-width space
        ("\ufeff\u2060\u00a0\u3000", True),
        ("\x00\x1b", True),
        ("\u2800\u3164\ufe0f", True),  # Braille blank, Hangul filler, variation selector
        (".", False),
        ("\u200b0", False),
        ("\U0001f600\ufe0f", False),
        ("\u0301", False),
    ],
)
def test_an_answer_in_which_nothing_shows_is_an_empty_one(
    tokenizer: Tokenizer, text: str, blank: bool
) -> None:
    assert is_blank(text) is blank
    encoded = encode_conversation(turns("One?", text, "Two?", "Yes."), tokenizer, "vicuna_v1", 0)
    empty = encode_conversation(turns("One?", "", "Two?", "Yes."), tokenizer, "vicuna_v1", 0)
    assert (encoded == empty) is blank
    assert (encode_conversation(turns("<image>", text), tokenizer, "plain", 1).num_labels == 0) is blank
    prompt = encode_prompt("Two?", tokenizer, "vicuna_v1", 0, [("One?", text)])
    assert encoded.tokens[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("question", "answer", "refused"),
    [
        ("<image1>\nWhat is it?", "A.", True),
        ("See <image_2> and <Image 3>.", "A.", True),
        ("<|image_1|> What?", "A.", True),
        ("What?", "It is <image-1>.", True),
        ("<|image_pad|>", "A.", True),
        ("<ImageHere>What?", "A.", True),
        ("<video>\nWhat happens?", "A.", True),
        ("What happens? \n <video> ", "A.", True),
        ("<img>\nWhat?", "A.", True),
        ("<Image>", "A.", True),
        # These are about markup, and keep their text.
        ("What does <video> do in HTML?", "It plays.", False),
        ("Write a page with <img>.", "<img>", False),
        ("Mend this:\n<video>\n<source>\n</video>", "<video></video>", False),
        ("What is image 1?", "<image2d> is a type of GLSL.", False),
    ],
)
@pytest.mark.parametrize("images", [0, 1])
def test_placeholders_of_other_models_are_refused(
    tokenizer: Tokenizer, question: str, answer: str, refused: bool, images: int
) -> None:
    conversation = turns("<image>" * images + "Hi.", "Hello.", question, answer)
    if not refused:
        assert encode_conversation(conversation, tokenizer, "vicuna_v1", images).num_images == images
        return
    with pytest.raises(ConversationError) as error:
        encode_conversation(conversation, tokenizer, "vicuna_v1", images)
    assert error.value.reason == "other_placeholder"
