"""Ids and labels of every kind of row against what the published code of VILA 1.0, VILA-1.5 and NVILA produced.

The published pickles are read here alone, by an unpickler that knows no class.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.mmc4 import Mmc4Source
from megatron_eve.data.text.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID, Encoded, encode_conversation
from megatron_eve.data.text.documents import encode_record
from megatron_eve.data.text.json_tokenizer import JsonTokenizer
from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.models.text_format import DOCUMENT, PLAIN, Template
from megatron_eve.models.vila.templates import TEXT_RULES
from tests.data.helpers import turns
from tests.golden_dir import find_golden

VILA_V1, VILA15_V1, LLAMA_3, QWEN2, _ = TEXT_RULES.templates.values()
NO_SYSTEM = {"from": "system", "value": ""}


class _NoClasses(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


def pickled(folder: Path, name: str) -> list[dict[str, Any]]:
    with (folder / "data" / name / "part-00000.pkl").open("rb") as file:
        rows: list[dict[str, Any]] = _NoClasses(file).load()
    return rows


def check(encoded: Encoded, folder: Path, name: str) -> None:
    """Published labels hold the id at a picture, where it means nothing, and at `<s>` of a document."""
    inputs = load_file(folder / "inputs.safetensors")
    tokens, labels = (inputs[f"sample.{name}.{what}"].tolist() for what in ("input_ids", "labels"))
    expected = [
        IGNORE_INDEX if token == IMAGE_TOKEN_ID else label
        for token, label in zip(tokens, labels, strict=True)
    ]
    assert encoded.tokens == tokens, name
    assert encoded.labels[1:] == expected[1:], name
    assert encoded.labels[0] == IGNORE_INDEX  # which no position predicts


@pytest.fixture(scope="module")
def vila10() -> tuple[Path, Tokenizer]:
    folder = find_golden("golden/vila/vila10_llm")
    return folder, Tokenizer(folder / "model/tokenizer.model", legacy=False)


@pytest.fixture(scope="module")
def vila15() -> tuple[Path, Tokenizer]:
    folder = find_golden("golden/vila/vila15_llm")
    return folder, Tokenizer(folder / "model/llm/tokenizer.model", legacy=False)


def test_documents_of_mmc4(vila10: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    folder, tokenizer = vila10
    lines = []
    for row in pickled(folder, "mmc4"):
        for picture in row["image_info"]:
            (tmp_path / picture["image_name"]).write_bytes(base64.b64decode(picture.pop("image_base64")))
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "docs.jsonl").write_text("".join(lines))
    source = Mmc4Source([tmp_path / "docs.jsonl"], str(tmp_path))
    records = [source.record(row) for row in source.rows()]
    assert len(records) == 2
    for number, record in enumerate(records):
        check(encode_record(record, tokenizer, DOCUMENT), folder, f"mmc4_{number}")


def test_pairs_of_coyo(vila10: tuple[Path, Tokenizer]) -> None:
    """The published code makes a group of four of them, and drops the fifth."""
    folder, tokenizer = vila10
    for number, row in enumerate(pickled(folder, "coyo")[:4]):
        caption = row["text"].replace("<image>", "<IMAGE>")  # as every source of pairs does
        record = Record(None, "", "pair", [ImageFile(b"")], [{"from": "gpt", "value": f"<image>{caption}"}])
        check(encode_record(record, tokenizer, DOCUMENT), folder, f"coyo_group0.{number}")


def test_conversations_of_the_first_release(vila10: tuple[Path, Tokenizer]) -> None:
    folder, tokenizer = vila10
    rows = json.loads((folder / "data/conversations.json").read_text())
    for row, name in zip(rows, ("sft_image", "sft_text"), strict=True):
        images = int("image" in row)
        check(encode_conversation(row["conversations"], tokenizer, VILA_V1, images), folder, name)
    (row,) = json.loads((folder / "data/plain.json").read_text())
    check(encode_conversation(row["conversations"], tokenizer, PLAIN, 1), folder, "plain")


def test_rows_of_vflan_have_no_system_text(vila10: tuple[Path, Tokenizer]) -> None:
    """An empty system turn says so. The published code puts a placeholder for each picture in front of the question."""
    folder, tokenizer = vila10
    rows = pickled(folder, "vflan")
    assert [row["id"] for row in rows] == ["multi", "text"]
    for row in rows:
        question, count = row["question"].replace("<image>\n", "").rstrip(), len(row["image"])
        said = [NO_SYSTEM, *turns("<image>\n" * count + question, row["answer"])]
        check(encode_conversation(said, tokenizer, VILA_V1, count), folder, f"vflan_{row['id']}")


def test_rows_of_the_second_release(vila15: tuple[Path, Tokenizer]) -> None:
    folder, tokenizer = vila15
    meta = json.loads((folder / "meta.json").read_text())
    for kind, name in (("interleaved", "interleaved"), ("pair", "pair")):
        text = meta[f"decoded.{name}"].removeprefix("<s>").removesuffix("</s>").replace("<unk> ", "<image>")
        images = [ImageFile(b"")] * text.count("<image>")
        record = Record(None, "", kind, images, [{"from": "gpt", "value": text}])  # type: ignore[arg-type]
        check(encode_record(record, tokenizer, DOCUMENT), folder, name)
    compare = turns("Can you compare <image> with <image>?", "Yes, the first image is brighter.")
    check(encode_conversation(compare, tokenizer, VILA15_V1, 2), folder, "sft_multi")
    text = turns("What color is the car?", "Blue.", "Is there a cat?", "No.")
    check(encode_conversation(text, tokenizer, VILA15_V1, 0), folder, "sft_text")


def test_the_other_mode_of_the_tokenizer_gives_other_ids(vila10: tuple[Path, Tokenizer]) -> None:
    folder, right = vila10
    legacy = Tokenizer(right.path)
    said = json.loads((folder / "data/conversations.json").read_text())[1]["conversations"]
    one, other = (encode_conversation(said, each, VILA_V1, 0).tokens for each in (right, legacy))
    assert next(place for place in range(len(one)) if one[place] != other[place]) == 89
    assert len(one) == 106


CONVERSATIONS: dict[str, tuple[list[dict[str, str]], int]] = {
    "multi": (
        turns(
            "<image>\n<image>\nCan you compare the first image with the second image?",
            "Yes, the first image is brighter.",
        ),
        2,
    ),
    "text": (turns("What color is the car?", "Blue.", "Is there a cat?", "No."), 0),
    "interleaved": (
        turns("<image>\nHow many birds are there?", "Three.", "And here? <image>", "Two dogs."),
        2,
    ),
}


def written(tokenizer: JsonTokenizer, ids: list[int], behind_image: list[int]) -> Iterator[bytes]:
    """Text of ids; what follows each picture is checked and left out."""
    rest = list(ids)
    while rest:
        token = rest.pop(0)
        if token != IMAGE_TOKEN_ID:
            yield tokenizer.token_bytes(token)
            continue
        assert rest[: len(behind_image)] == behind_image
        del rest[: len(behind_image)]
        yield b"<image>"


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("system", [True, False])
def test_conversations_of_nvila(name: str, system: bool) -> None:
    folder = find_golden("golden/vila/vila_main_embed")
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = JsonTokenizer(folder / "model/llm/tokenizer.json")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (
        meta["special"]["len_tokenizer"],
        None,
        meta["special"]["eos"],
    )
    said, images = CONVERSATIONS[name]
    key = name if system else f"{name}_nosys"
    encoded = encode_conversation(said if system else [NO_SYSTEM, *said], tokenizer, QWEN2, images)
    text = b"".join(written(tokenizer, encoded.tokens, meta["special"]["newline_ids"])).decode()
    assert text == meta[f"decoded.{key}"]
    trained = [label for label in encoded.labels if label != IGNORE_INDEX]
    assert b"".join(map(tokenizer.token_bytes, trained)).decode() == meta[f"trained_text.{key}"]
    assert encoded.num_images == images


def test_headers_of_llama_3_are_one_token_each() -> None:
    """No tokenizer of Llama 3 is here: the text is checked, and that its control tokens are asked for."""
    assert list(LLAMA_3.control_tokens()) == ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"]
    assert LLAMA_3.system_text("") == ""
    assert isinstance(LLAMA_3, Template) and LLAMA_3.stop == ("<|end_of_text|>", "<|eot_id|>")
