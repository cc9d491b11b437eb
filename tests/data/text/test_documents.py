"""The template "document" and the templates of each kind, by hand and against what VILA's published code produced."""

from __future__ import annotations

from typing import Any

import pytest
from safetensors.numpy import load_file

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.reasons import REASONS
from megatron_eve.data.schema import KINDS, ImageFile, Record
from megatron_eve.data.text.conversation import (
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    Encoded,
    encode_conversation,
)
from megatron_eve.data.text.documents import encode_record
from megatron_eve.data.text.prompts import encode_prompt
from megatron_eve.data.text.templates import templates
from megatron_eve.data.text.tokenizer import Tokenizer
from tests.data.helpers import turns
from tests.golden_dir import find_golden

I, X = IMAGE_TOKEN_ID, IGNORE_INDEX
CAR = [282, 299, 347, 267, 300, 351]  # ▁A ▁re d ▁c ar .
CAT = [282, 267, 275, 351]  # ▁A ▁c at .
WHY = [316, 344, 359, 366]  # ▁W h y ?


def record(kind: Any, text: object, num_images: int = 0) -> Record:
    images = [ImageFile(path=f"{number}.jpg") for number in range(num_images)]
    return Record(None, "", kind, images, [{"from": "gpt", "value": text}])


@pytest.mark.parametrize(
    ("kind", "text", "num_images", "tokens", "labels"),
    [
        ("pair", "<image>A red car.", 1, [1, I, *CAR, 2], [X, X, *CAR, 2]),
        ("text", "A cat.", 0, [1, *CAT, 2], [X, *CAT, 2]),
        (
            "interleaved",
            "A cat.<image>Why?<image><image>A red car.",
            3,
            [1, *CAT, I, *WHY, I, I, *CAR, 2],
            [X, *CAT, X, *WHY, X, X, *CAR, 2],
        ),
        ("interleaved", "A cat.", 0, [1, *CAT, 2], [X, *CAT, 2]),
        # A document that ends in pictures loses them, and keeps its </s>.
        ("interleaved", "<image>A cat.<image><image>", 3, [1, I, *CAT, 2], [X, X, *CAT, 2]),
        # Spaces are part of a stretch: "▁" in front and "▁▁" for one of its own.
        ("text", " A cat.", 0, [1, 336, *CAT, 2], [X, 336, *CAT, 2]),
    ],
)
def test_tokens_and_labels_by_hand(
    tokenizer: Tokenizer, kind: str, text: str, num_images: int, tokens: list[int], labels: list[int]
) -> None:
    found = encode_record(record(kind, text, num_images), tokenizer, "document")
    assert (found.tokens, found.labels) == (tokens, labels)


# The texts of `decoded` in the golden case's meta.json, with <image> for <unk>.
GOLDEN = {
    "mmc4_0": "<image>Photos from our trip to the mountains last summer. The lake was calm in the morning, and we "
    "walked along the shore.<image>Visitors may take photographs without flash. This recipe uses flour, sugar, eggs "
    "and butter.",
    "mmc4_1": "<image>Bake the bread.<image><image>Let it cool <IMAGE> before slicing.",
    "coyo_group0.0": "<image>A small house by the lake.",
    "coyo_group0.1": "<image>Two dogs <IMAGE> running.",
    "coyo_group0.2": "<image>A red square",
    "coyo_group0.3": "<image>The museum opened in 1926.",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_tokens_and_labels_of_the_published_code(name: str) -> None:
    """Its labels are the ids, also of `<s>` and of pictures, where they mean nothing."""
    folder = find_golden("golden/vila/vila10_llm")
    inputs = load_file(folder / "inputs.safetensors")
    tokens = inputs[f"sample.{name}.input_ids"].tolist()
    assert inputs[f"sample.{name}.labels"].tolist() == tokens
    text = GOLDEN[name]
    kind = "interleaved" if name.startswith("mmc4") else "pair"
    found = encode_record(
        record(kind, text, text.count("<image>")), Tokenizer(folder / "model/tokenizer.model"), "document"
    )
    assert found.tokens == tokens
    assert found.labels == [X, *(X if token == I else token for token in tokens[1:])]


def test_a_cut_document_that_ends_in_pictures_loses_them(tokenizer: Tokenizer) -> None:
    whole = encode_record(record("interleaved", "A cat.<image><image>Why?", 2), tokenizer, "document")
    assert whole.cut(7).tokens == whole.cut(6).tokens == whole.cut(5).tokens == [1, *CAT]
    assert whole.cut(7).labels == [X, *CAT]
    assert whole.cut(8).tokens == [1, *CAT, I, I, WHY[0]]
    assert whole.cut(100) == whole
    # Elsewhere a picture at the end stays: EVE aligns its patches with the teacher's, whatever follows.
    assert Encoded([1, I], [X, X]).cut(2).tokens == [1, I]


def test_a_pair_is_a_question_without_text_and_its_caption(tokenizer: Tokenizer) -> None:
    found = encode_record(record("pair", "<image>A red car.", 1), tokenizer, "plain")
    assert found == encode_conversation(turns("<image>", "A red car."), tokenizer, "plain", 1)
    assert found.tokens[:-1] == [1, I, *CAR]
    assert encode_record(record("pair", "<image>", 1), tokenizer, "plain").num_labels == 0


def test_conversations_are_encoded_as_before(tokenizer: Tokenizer) -> None:
    said = turns("<image>\nWhy?", "A cat.")
    for template in ("plain", "vicuna_v1"):
        row = Record(None, "", "conversation", [ImageFile(path="a.jpg")], said)
        assert encode_record(row, tokenizer, template) == encode_conversation(said, tokenizer, template, 1)


@pytest.mark.parametrize("template", sorted(templates().keys() - {"chat_template"}))
@pytest.mark.parametrize("kind", KINDS)
def test_which_template_takes_which_kind(tokenizer: Tokenizer, kind: Any, template: str) -> None:
    takes = {
        "plain": {"conversation", "pair"},
        "vicuna_v1": {"conversation"},
        "document": {"interleaved", "pair", "text"},
        "nvila_document": {"interleaved", "pair", "text"},
        "v1": {"conversation", "generation"},
        "v1_document": {"interleaved", "pair", "text"},
        "siglip_pair": {"conversation", "pair"},
        "eve2_plain": {"conversation", "pair"},
    }
    row = record(kind, "A cat." if kind == "text" else "<image>A cat.", kind != "text")
    if kind == "conversation":
        row = Record(None, "", "conversation", row.images, turns("<image>", "A cat."))
    if kind == "generation":
        row = Record(None, "", "generation", row.images, turns("A cat.", "<image>"))
    if kind in takes.get(template, {"conversation"}):
        assert encode_record(row, tokenizer, template).num_labels
    else:
        with pytest.raises(
            SkipRow, match=f"kind_template: a row of kind {kind}, and --template {template} takes"
        ):
            encode_record(row, tokenizer, template)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (record("pair", "<image>", 1), "nothing_to_train"),
        (record("pair", "<image> \u200b", 1), "nothing_to_train"),
        (record("text", "\n"), "nothing_to_train"),
        (record("interleaved", "<image> <image>", 2), "nothing_to_train"),
        (record("pair", "A cat.", 1), "image_without_placeholder"),
        (record("text", "A <image> cat."), "placeholder_without_image"),
        (record("text", "A cat.", 1), "image_without_placeholder"),
        (record("interleaved", "<image>A cat.", 2), "image_count"),
        (record("text", 7), "value_not_text"),
        (record("text", "half \ud83d pair"), "text_not_unicode"),
        (Record(None, "", "text", [], turns("A", "B")), "document_turns"),
        (Record(None, "", "text", [], turns("A")), "document_turns"),
        (Record(None, "", "text", [], []), "no_conversation"),
        (Record(None, "", "text", [], "A cat."), "no_conversation"),
    ],
)
def test_records_that_no_document_can_be_made_of(tokenizer: Tokenizer, row: Record, reason: str) -> None:
    assert reason in REASONS
    with pytest.raises(SkipRow, match=f"^{reason}: "):
        encode_record(row, tokenizer, "document")


def test_a_caption_that_holds_a_picture_is_no_caption(tokenizer: Tokenizer) -> None:
    with pytest.raises(SkipRow, match="image_in_caption"):
        encode_record(record("pair", "<image>A <image>cat.", 2), tokenizer, "plain")
    with pytest.raises(SkipRow, match="image_without_placeholder"):
        encode_record(record("pair", "A cat.", 1), tokenizer, "plain")


def test_a_pair_of_a_video_is_its_frames_and_a_caption(tokenizer: Tokenizer) -> None:
    row = record("pair", "<image>" * 3 + "A cat.", 3)
    caption = tokenizer.encode("A cat.\n")
    plain = encode_record(row, tokenizer, "plain")
    assert plain.tokens == [1, -200, -200, -200, *caption]
    assert plain.labels == [-100] * 4 + caption
    document = encode_record(row, tokenizer, "document")
    assert document.tokens == [1, -200, -200, -200, *tokenizer.encode("A cat."), 2]
    assert document.cut(4).tokens == [1]


def test_documents_are_no_template_of_prompts(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"unknown template 'document': use one of plain, vicuna_v1"):
        encode_prompt("Why?", tokenizer, "document", 0)
    with pytest.raises(ValueError, match=r"unknown template 'v0': use one of plain, vicuna_v1, document"):
        encode_record(record("text", "A cat."), tokenizer, "v0")
