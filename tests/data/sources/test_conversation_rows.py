"""The ways in which data sets write conversations and their images: each becomes the same record."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.llava import LlavaSource
from megatron_eve.data.sources.parquet import ParquetSource
from megatron_eve.data.sources.source import RawRow
from megatron_eve.data.text.tokenizer import Tokenizer
from tests.data.helpers import MakeConfig, encoded, opened, picture, run, skipped_rows, turns

TEXT = {"type": "text", "text": "Which is older?"}
ANSWER = {"role": "assistant", "content": "The left one."}
PICTURE = encoded(picture(20, 10), "PNG")
URI = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"


def image(**more: Any) -> dict[str, Any]:
    return {"type": "image", **more}


def asked(*parts: Any, **row: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER], **row}


def spoken(question: str, **row: Any) -> dict[str, Any]:
    """The same with a text as content."""
    return {"messages": [{"role": "user", "content": question}, ANSWER], **row}


def llava(question: str, **row: Any) -> dict[str, Any]:
    return {"conversations": turns(question, "The left one."), **row}


def record(row: dict[str, Any]) -> Record:
    return LlavaSource([]).record(RawRow("data.json", 1, json.dumps(row).encode()))


def reason(row: dict[str, Any]) -> str:
    with pytest.raises(SkipRow) as skip:
        record(row)
    return skip.value.reason


A, B = ImageFile(path="a.jpg"), ImageFile(path="b.jpg")
TWO = ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    ("row", "question", "images"),
    [
        (asked(TEXT), "Which is older?", []),
        (asked(image(), TEXT, image="a.jpg"), "<image>\nWhich is older?", [A]),
        (asked(image(image="a.jpg"), TEXT), "<image>\nWhich is older?", [A]),
        (asked(image(path="a.jpg"), TEXT), "<image>\nWhich is older?", [A]),
        (asked({"image": "a.jpg"}, {"text": "Which?"}), "<image>\nWhich?", [A]),
        (asked(TEXT, image(), TEXT, image(), images=TWO), "Which is older?<image>\n" * 2, [A, B]),
        (asked(image(index=1), image(index=0), images=TWO), "<image>\n<image>\n", [B, A]),
        (asked(image(image="a.jpg"), image(), images=["b.jpg"]), "<image>\n<image>\n", [A, B]),
        (asked(image(image="a.jpg"), image(url="b.jpg"), images=TWO), "<image>\n<image>\n", [A, B]),
        (asked(image(url="file:///b%20c.jpg")), "<image>\n", [ImageFile(path="/b c.jpg")]),
        (asked({"type": "image_url", "image_url": {"url": URI}}), "<image>\n", [ImageFile(data=PICTURE)]),
        (asked({"type": "image_url", "image_url": URI}), "<image>\n", [ImageFile(data=PICTURE)]),
        (asked(image(base64=URI.split(",")[1])), "<image>\n", [ImageFile(data=PICTURE)]),
        # Parts of a table that has a column for each key.
        (asked(image(text=None, index=None), {**TEXT, "url": None}, images=["a.jpg"]), "<image>\nWhich is older?", [A]),
        # A text says the places, or says none, and then they are in front of the first question, as in TRL.
        (spoken("A <image> or <image>?", images=TWO), "A <image> or <image>?", [A, B]),
        (spoken("Which?", images=TWO), "<image>\n<image>\nWhich?", [A, B]),
        (llava("<image> <image>", images=TWO, messages=None), "<image> <image>", [A, B]),
        ({"conversations": spoken("Which? <image>")["messages"], "image": "a.jpg"}, "Which? <image>", [A]),
        ({"conversations": [{"from": "user", "value": "Which?"}, ANSWER]}, "Which?", []),
        (spoken("Which?", conversations=[]), "Which?", []),
    ],
)  # fmt: skip
def test_a_question_and_its_images(row: dict[str, Any], question: str, images: list[ImageFile]) -> None:
    found = record(row)
    assert found.turns == turns(question, "The left one.")
    assert (found.kind, found.images) == ("conversation", images)


def test_a_system_turn_and_what_else_the_row_says() -> None:
    row = asked(TEXT, id=7, license="CC0", images=[])
    row["messages"].insert(0, {"role": "system", "content": [{"type": "text", "text": "Be brief."}]})
    found = record(row)
    assert found.turns == [
        {"from": "system", "value": "Be brief."},
        *turns("Which is older?", "The left one."),
    ]
    assert (found.id, found.meta) == ("7", {"license": "CC0"})
    # Images go in front of the question, not of the system prompt.
    row = spoken("Which?", images=TWO)
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    assert [turn["value"] for turn in record(row).turns][:2] == ["Be brief.", "<image>\n<image>\nWhich?"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({**asked(TEXT), "conversations": turns("x", "y")}, "two_conversations"),
        (asked("Which?"), "message_part"),
        (asked({"type": "input_audio", "input_audio": {}}), "message_part"),
        (asked({"type": "video", "video": "a.mp4"}), "message_part"),
        (asked({}), "message_part"),
        (asked({"type": "text"}), "value_not_text"),
        (asked(image(), TEXT), "image_count"),
        (asked(image(), image(), images=["a.jpg"]), "image_count"),
        (asked(image(), images=TWO), "image_count"),
        (asked(image(index=0), image(index=0), images=TWO), "image_count"),
        (asked(image(index=2), image(index=0), images=TWO), "image_count"),
        (asked(image(index=-1), images=["a.jpg"]), "image_count"),
        (asked(image(image="b.jpg"), images=["a.jpg"]), "image_field"),
        (asked(image(image=7)), "image_field"),
        (asked(image(image={})), "image_field"),
        (asked(image(image="")), "image_field"),
        (asked({"type": "image_url", "image_url": {"url": "https://example.org/a.jpg"}}), "image_remote"),
        (asked({"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}), "image_data_uri"),
        (asked({"type": "image_url", "image_url": {"url": "data:image/png,abc"}}), "image_data_uri"),
        (asked(TEXT, img="a.jpg"), "image_field"),
        (asked(TEXT, audio="a.wav"), "other_media"),
    ],
)
def test_rows_that_cannot_be_read(row: dict[str, Any], expected: str) -> None:
    assert reason(row) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_every_way_of_writing_it_gives_the_same_sample(make_config: MakeConfig, workers: int) -> None:
    question = "<image>\nWhich is older?"
    in_parts = [
        asked(image(), TEXT, images=["ok.jpg"]),
        asked(image(image="ok.jpg"), TEXT),
        asked(TEXT, image(image="./ok.jpg")),  # a question's only picture goes to its front
        llava(question, image="ok.jpg"),
        spoken(question, images=["ok.jpg"]),
        spoken(TEXT["text"], image="ok.jpg"),
        asked(image(image="ok.jpg"), TEXT, TEXT),
        asked(image(image="http://example.org/ok.jpg"), TEXT),
    ]
    in_parts[-2]["messages"][0]["content"][1:] = [
        {"type": "text", "text": one} for one in ("Which is ", "older?")
    ]
    config = make_config(in_parts, template="vicuna_v1", lines=True, workers=workers)
    file = Path(config.image_root or "") / "ok.jpg"
    info = run(config)
    assert (info.num_samples, info.skipped) == (7, {"image_remote": 1})
    assert [row["row"] for row in skipped_rows(config)] == [8]
    dataset = opened(config)
    tokens, labels = dataset.text(0)
    said = Tokenizer(config.tokenizer_model).decode([token for token in tokens.tolist() if token >= 0])
    assert " ".join(said.split()).endswith("USER: Which is older? ASSISTANT: The left one.")
    for row in range(7):
        assert [part.tolist() for part in dataset.text(row)] == [tokens.tolist(), labels.tolist()]
        assert dataset.image_bytes(row) == file.read_bytes()


def test_messages_of_parquet(tmp_path: Path, make_config: MakeConfig) -> None:
    """As in HuggingFaceH4/llava-instruct-mix-vsft: parts with an index, and a column of images."""
    part = pyarrow.struct(
        [("index", pyarrow.int64()), ("text", pyarrow.string()), ("type", pyarrow.string())]
    )
    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.list_(part))])
    user = {"role": "user", "content": [{"type": "text", "text": "Which?"}, {"type": "image", "index": 0}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": "The left one."}]}
    stored = [{"bytes": PICTURE, "path": None}]
    columns = {
        "messages": pyarrow.array([[user, reply]] * 2, pyarrow.list_(message)),
        "images": [stored, []],
        "source": ["vsft", "vsft"],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    source = ParquetSource([tmp_path / "a.parquet"])
    rows = list(source.rows())
    first = source.record(rows[0])
    assert first.turns == turns("Which?<image>\n", "The left one.")
    assert (first.images, first.meta) == ([ImageFile(PICTURE)], {"source": "vsft"})
    with pytest.raises(SkipRow, match="image_count: images: 0, image parts: 1"):
        source.record(rows[1])
    config = make_config([], input=str(tmp_path / "a.parquet"), image_root=None, template="vicuna_v1")
    assert run(config).skipped == {"image_count": 1}
    assert opened(config).image_bytes(0) == PICTURE
