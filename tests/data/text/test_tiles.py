"""Texts of pictures in tiles, by NVILA's tokenizer: `<image>` and a newline by tile, in training and in prompts."""

from __future__ import annotations

import pytest

from megatron_eve.data.schema import ImageFile, Kind, Record
from megatron_eve.data.text.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID, tiled_text
from megatron_eve.data.text.documents import encode_record
from megatron_eve.data.text.load_tokenizer import load_tokenizer
from megatron_eve.data.text.prompts import encode_text, prompt_text
from megatron_eve.data.text.text_tokenizer import TextTokenizer
from tests.golden_dir import find_golden


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return load_tokenizer(
        str(find_golden("vila/vila_main_embed") / "model" / "llm" / "tokenizer.json"), False
    )


def record(kind: Kind, turns: list[tuple[str, str]], images: int) -> Record:
    rows = [{"from": role, "value": text} for role, text in turns]
    return Record(None, "", kind, [ImageFile(path="a.jpg")] * images, rows)


def test_each_image_is_one_by_tile() -> None:
    assert tiled_text("a <image>\nb <image>", [2, 1]) == "a <image>\n<image>\n\nb <image>\n"


def test_a_conversation_and_its_prompt_begin_alike(tokenizer: TextTokenizer) -> None:
    """The newline of the published encoder behind each tile, and that of the text."""
    row = record("conversation", [("human", "<image>\nWhat is it?"), ("gpt", "A car.")], 1)
    found = encode_record(row, tokenizer, "qwen2", [3])
    prompt = encode_text(tiled_text(prompt_text("What is it?", "qwen2", 1), [3]), tokenizer, "qwen2")
    assert found.tokens[: len(prompt)] == prompt
    assert found.labels[: len(prompt)] == [IGNORE_INDEX] * len(prompt)
    (newline,) = tokenizer.encode("\n")
    places = [place for place, token in enumerate(prompt) if token == IMAGE_TOKEN_ID]
    assert len(places) == 3 and [prompt[place + 1] for place in places] == [newline] * 3
    assert prompt[places[0] : places[1]] == [IMAGE_TOKEN_ID, newline, newline]


def test_a_caption_and_its_prompt_begin_alike(tokenizer: TextTokenizer) -> None:
    row = record("conversation", [("human", "<image>\nx"), ("gpt", "A car.")], 1)
    found = encode_record(row, tokenizer, "plain", [2])
    prompt = encode_text(tiled_text(prompt_text("", "plain", 1), [2]), tokenizer, "plain")
    assert found.tokens[: len(prompt)] == prompt and prompt.count(IMAGE_TOKEN_ID) == 2


def test_a_document_of_nvila_is_the_published_text(tokenizer: TextTokenizer) -> None:
    """Of `LazyMMC4Dataset`: a picture is `<image>` and a newline, then one of both by tile, and all of it trains; the
    encoder puts a newline behind each picture that does not. EOS is the tokenizer's."""
    row = record("interleaved", [("gpt", "One.<image>Two. <image><image>Three.<image>")], 4)
    for tiles, texts in (
        (None, ["One.", "\nTwo. ", "\n", "\nThree."]),
        ([3, 1, 2, 1], ["One.", "\n", "\n", "\n\nTwo. ", "\n\n", "\n", "\n\nThree."]),
    ):
        found = encode_record(row, tokenizer, "nvila_document", tiles)
        (newline,) = tokenizer.encode("\n")
        expected, labels = [], []
        for number, text in enumerate(texts):
            if number:
                expected += [IMAGE_TOKEN_ID, newline]
                labels += [IGNORE_INDEX] * 2
            expected += tokenizer.encode(text)
            labels += tokenizer.encode(text)
        assert found.tokens == [*tokenizer.bos, *expected, tokenizer.eos_id]
        assert found.labels == [*[IGNORE_INDEX] * len(tokenizer.bos), *labels, tokenizer.eos_id]


def test_a_document_still_loses_the_pictures_at_its_end(tokenizer: TextTokenizer) -> None:
    row = record("interleaved", [("gpt", "<image>One.<image>Two.<image>")], 3)
    found = encode_record(row, tokenizer, "document", [2, 3, 4])
    assert found.num_images == 5 and found.whole_images([2, 3, 4]) == 2
    (newline,) = tokenizer.encode("\n")
    assert all(
        found.tokens[place + 1] == newline
        for place, token in enumerate(found.tokens)
        if token == IMAGE_TOKEN_ID
    )
