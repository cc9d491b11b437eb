"""Documents of MMC4 and rows of text, in their published keys, and what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.format.merging import merge_datasets
from megatron_eve.data.preprocessing.summary import format_summary
from megatron_eve.data.reasons import REASONS
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.json_source import JsonSource
from megatron_eve.data.sources.mmc4 import Mmc4Source
from megatron_eve.data.sources.source import RawRow
from megatron_eve.data.sources.text import TextSource
from megatron_eve.data.text.documents import encode_record
from megatron_eve.data.text.tokenizer import Tokenizer
from tests.data.helpers import MakeConfig, run
from tests.golden_dir import find_golden


def document(sentences: list[str], *matches: int, **change: Any) -> dict[str, Any]:
    """A line of MMC4; picture n is matched to sentence matches[n]."""
    info = [
        {
            "image_name": f"{number:012x}.jpg",
            "raw_url": f"https://example.com/{number}.jpg",
            "matched_text_index": place,
            "matched_sim": 0.25 + number / 100,
            "face_detections": None,
        }
        for number, place in enumerate(matches)
    ]
    found = {"text_list": sentences, "url": "https://example.com/page", "could_have_url_duplicate": 0}
    return found | {"similarity_matrix": [[0.2] * len(sentences)] * len(info), "image_info": info} | change


def read(
    source: type[JsonSource], path: Path, *lines: object, missing: tuple[int, ...] = ()
) -> list[Record | str]:
    """Records, and reasons of the rows that are none; lines of bytes are written as they are.

    The pictures lie beside the lines, but for those of the numbers in `missing`.
    """
    for name in ("a.jpg", *(f"{number:012x}.jpg" for number in range(10) if number not in missing)):
        (path.parent / name).touch()
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(text + b"\n" for text in texts))
    worker = source([path], str(path.parent))
    found: list[Record | str] = []
    for row in source([path], str(path.parent)).rows():
        try:
            found.append(worker.record(row))
        except SkipRow as skip:
            assert skip.reason in REASONS
            found.append(skip.reason)
    return found


def test_a_document_of_mmc4(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    line = document(["Bake the bread.", "Let it cool <image> before slicing.", "Eat."], 1, 0, 1)
    (record,) = read(Mmc4Source, tmp_path / "core" / "docs_shard_0_v3.jsonl", line)
    assert record == Record(
        id=None,
        source="core/docs_shard_0_v3.jsonl",
        kind="interleaved",
        images=[ImageFile(path=f"{number:012x}.jpg") for number in (1, 0, 2)],
        turns=[
            {
                "from": "gpt",
                "value": "<image>Bake the bread.<image><image>Let it cool <IMAGE> before slicing. Eat.",
            }
        ],
        meta={
            "url": "https://example.com/page",
            "raw_url": [f"https://example.com/{number}.jpg" for number in (1, 0, 2)],
            "matched_sim": [0.26, 0.25, 0.27],
        },
    )


@pytest.mark.parametrize(
    ("line", "text", "images"),
    [
        (document(["A B", "C", "D"], 1, 2), "A B<image>C<image>D", [0, 1]),
        # The first six of the list, wherever they are matched.
        (
            document(list("ABCDEFG"), 6, 5, 4, 3, 2, 1, 0),
            "A<image>B<image>C<image>D<image>E<image>F<image>G",
            None,
        ),
        (document(["A"]), "A", []),
        # One space goes on either side, as published.
        (document(["A ", " B"], 1), "A <image>B", [0]),
        # A picture that no text follows.
        (document(["A", ""], 0, 1), "<image>A", [0]),
        (document(["A", "", ""], 2, 0, 1, 2), "<image>A", [1]),
        (document([""], 0), "", []),
        (document(["A"], 0, similarity_matrix=None), "<image>A", [0]),
        # What is matched to nothing is no problem where it is not taken.
        (document(["A"], *[0] * 6, 9), "<image>" * 6 + "A", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_how_documents_are_put_together(
    tmp_path: Path, line: dict[str, Any], text: str, images: list[int] | None
) -> None:
    (record,) = read(Mmc4Source, tmp_path / "a.jsonl", line)
    assert isinstance(record, Record)
    assert record.turns == [{"from": "gpt", "value": text}]
    expected = [5, 4, 3, 2, 1, 0] if images is None else images
    assert [image.path for image in record.images] == [f"{number:012x}.jpg" for number in expected]
    assert record.meta["raw_url"] == [f"https://example.com/{number}.jpg" for number in expected]


@pytest.mark.parametrize(
    ("missing", "text", "images"),
    [
        ((0,), "A<image>B<image>C<image>D<image>E<image>F<image>G", [1, 2, 3, 4, 5, 6]),
        ((0, 1, 2), "A B C<image>D<image>E<image>F<image>G", [3, 4, 5, 6]),
        ((1, 2, 3, 4, 5, 6), "<image>A B C D E F G", [0]),
        ((7,), "<image>A<image>B<image>C<image>D<image>E<image>F G", [0, 1, 2, 3, 4, 5]),
        (tuple(range(10)), None, []),
    ],
)
def test_pictures_that_are_not_there_are_passed_over(
    tmp_path: Path, missing: tuple[int, ...], text: str | None, images: list[int]
) -> None:
    line = document(list("ABCDEFG"), 0, 1, 2, 3, 4, 5, 6)
    (record,) = read(Mmc4Source, tmp_path / "a.jsonl", line, missing=missing)
    if text is None:
        assert record == "image_missing"
        return
    assert isinstance(record, Record) and record.turns == [{"from": "gpt", "value": text}]
    assert [image.path for image in record.images] == [f"{number:012x}.jpg" for number in images]
    assert record.meta["raw_url"] == [f"https://example.com/{number}.jpg" for number in images]
    assert record.num_missing == len([number for number in missing if number < 7])


@pytest.mark.parametrize("workers", [1, 2])
def test_missing_pictures_are_counted(make_config: MakeConfig, tmp_path: Path, workers: int) -> None:
    there, gone = ({"image_name": name, "matched_text_index": 0} for name in ("ok.jpg", "no.jpg"))
    info = [[there, gone, gone], [gone], [there], [gone, gone | {"image_name": "../no.jpg"}, there]]
    lines = [document(["A lake.", "A hill."], image_info=one, similarity_matrix=None) for one in info]
    config = make_config(lines, lines=True, template="document", workers=workers)
    made = run(config)
    assert (made.num_samples, made.num_images, made.num_missing_images) == (3, 3, 4)
    assert made.skipped == {"image_missing": 1}
    said = "images missing    4, which documents that were kept go on without"
    assert said in format_summary(made, config.output_prefix)
    other = make_config(lines[:1], lines=True, template="document", output_prefix=str(tmp_path / "other"))
    run(other)
    both = merge_datasets(str(tmp_path / "both"), [config.output_prefix, other.output_prefix])
    assert both.num_missing_images == 6


def test_reading_a_row_twice_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(document(["A <image>", "B"], 1, 0)))
    for number in range(2):
        (tmp_path / f"{number:012x}.jpg").touch()
    source = Mmc4Source([path], str(tmp_path))
    (row,) = source.rows()
    assert source.record(row) == source.record(row)


MATCH = {"image_name": "a.jpg", "matched_text_index": 0}
BAD_LINES = [
    (document(["A"], 1), "matched_text_index"),
    (document(["A"], -1), "matched_text_index"),
    (document([], 0), "matched_text_index"),
    (document(["A"], True), "matched_text_index"),  # type: ignore[arg-type]
    (document(["A"], 0, image_info=[MATCH | {"matched_text_index": None}]), "matched_text_index"),
    (document(["A"], 0, image_info=[MATCH | {"matched_text_index": 0.0}]), "matched_text_index"),
    (document(["A"], 0, image_info=[{"matched_text_index": 0}]), "image_field"),
    (document(["A"], 0, image_info=[MATCH | {"image_name": ""}]), "image_field"),
    (document(["A"], 0, image_info=[MATCH | {"image_name": 7}]), "image_field"),
    (document(["A"], 0, image_info=["a.jpg"]), "document_layout"),
    (document(["A"], 0, image_info=None), "document_layout"),
    (document(["A"], 0, similarity_matrix=[]), "document_layout"),
    (document(["A"], 0, similarity_matrix=[[0.1, 0.2]]), "document_layout"),
    (document(["A"], 0, similarity_matrix=[0.1]), "document_layout"),
    (document(["A"], 0, similarity_matrix={}), "document_layout"),
    ({"url": "https://example.com"}, "document_layout"),
    (document("A"), "document_layout"),  # type: ignore[arg-type]
    (document(["A", 7]), "value_not_text"),  # type: ignore[list-item]
    (document(["half \ud83d pair"]), "text_not_unicode"),
]
NOT_JSON = [
    (b"{", "broken_json"),
    (b'{"text_list": ["\x00"]}', "broken_json"),
    (b'{"text": "\x00"}', "broken_json"),
    (b"\x00", "broken_json"),
    (b'{"text": "\xff"}', "broken_json"),
    (b'{"text": ' * 10_000 + b"1" + b"}" * 10_000, "broken_json"),
    (b"[" * 100_000, "broken_json"),
    (b"7", "not_an_object"),
    (b"[]", "not_an_object"),
    (b"null", "not_an_object"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES + NOT_JSON)
def test_documents_that_are_left_out_and_their_neighbours(tmp_path: Path, line: object, reason: str) -> None:
    good = document(["A", "B"], 1)
    found = read(Mmc4Source, tmp_path / "a.jsonl", good, line, good)
    assert [type(found[0]), found[1], type(found[2])] == [Record, reason, Record]


def test_rows_of_text(tmp_path: Path) -> None:
    (tmp_path / "c4").mkdir()
    flan = {"inputs": "Is it <image> raining?", "targets": "yes", "task": "weather"}
    lines = [
        {"text": "Rain fell.\n<image>", "url": "https://example.com", "score": None, "id": 7},
        flan,
        {"text": "x" * 4_000_000},
    ]
    text, question, large = read(TextSource, tmp_path / "c4" / "rows.jsonl", *lines)
    assert text == Record(
        id="7",
        source="c4/rows.jsonl",
        kind="text",
        images=[],
        turns=[{"from": "gpt", "value": "Rain fell.\n<IMAGE>"}],
        meta={"url": "https://example.com", "score": None},
    )
    assert question == Record(
        id=None,
        source="c4/rows.jsonl",
        kind="conversation",
        images=[],
        turns=[{"from": "human", "value": "Is it <IMAGE> raining?"}, {"from": "gpt", "value": "yes"}],
        meta={"task": "weather"},
    )
    assert isinstance(large, Record) and len(large.turns[0]["value"]) == 4_000_000


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"text": " \n\u200b"}, "nothing_to_train"),
        ({"text": ""}, "nothing_to_train"),
        ({"inputs": "Why?", "targets": " "}, "nothing_to_train"),
        ({"inputs": "Why?"}, "text_field"),
        ({"targets": "x"}, "text_field"),
        ({}, "text_field"),
        ({"caption": "x"}, "text_field"),
        ({"text": None}, "value_not_text"),
        ({"text": ["a"]}, "value_not_text"),
        ({"inputs": "Why?", "targets": 4}, "value_not_text"),
        ({"text": "half \ud83d pair"}, "text_not_unicode"),
        *NOT_JSON,
    ],
)
def test_texts_that_are_left_out_and_their_neighbours(tmp_path: Path, line: object, reason: str) -> None:
    found = read(TextSource, tmp_path / "a.jsonl", {"text": "A"}, line, {"text": "B"})
    assert [type(found[0]), found[1], type(found[2])] == [Record, reason, Record]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["<image>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
PICTURE = st.fixed_dictionaries(
    {},
    optional={"image_name": VALUES | st.just("wide.jpg"), "matched_text_index": VALUES | st.integers(0, 2)},
)
DOCUMENT = st.fixed_dictionaries(
    {
        "text_list": st.lists(st.sampled_from(["A.", "", " <image> "]), max_size=3) | VALUES,
        "image_info": st.lists(PICTURE, max_size=7) | VALUES,
    },
    optional={"similarity_matrix": VALUES, "text": VALUES, "inputs": VALUES, "targets": VALUES, "id": VALUES},
)


@settings(max_examples=400, deadline=None)
@given(line=DOCUMENT)
def test_any_object_is_a_record_that_can_be_encoded_or_is_refused_with_a_reason(line: dict[str, Any]) -> None:
    tokenizer = Tokenizer(find_golden("tokenize") / "tokenizer.model")
    row = RawRow("a.jsonl", 1, json.dumps(line).encode())
    root = str(find_golden("version1") / "photos")
    for source in (Mmc4Source([], root), TextSource([])):
        try:
            record = source.record(row)
            template = "vicuna_v1" if record.kind == "conversation" else "document"
            encoded = encode_record(record, tokenizer, template)
        except SkipRow as skip:
            assert skip.reason in REASONS
        else:
            assert encoded.num_images == len(record.images) and encoded.num_labels
            assert len(encoded.tokens) == len(encoded.labels) and encoded.tokens[0] == 1


def test_several_files_are_read_one_behind_the_other(tmp_path: Path) -> None:
    files = [tmp_path / "b.jsonl", tmp_path / "a.json"]
    files[0].write_text('{"text": "1"}\n\n{"text": "2"}\n')
    files[1].write_text('[{"text": "3"}, {"text": "4"}]')
    source = TextSource(files)
    rows = list(source.rows())
    first, second = map(str, files)
    assert [(row.file, row.number) for row in rows] == [(first, 1), (first, 3), (second, 1), (second, 2)]
    assert [source.record(row).turns[0]["value"] for row in rows] == ["1", "2", "3", "4"]
    assert source.position == source.num_bytes == sum(file.stat().st_size for file in files)


def test_files_that_stop_the_command(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "1"}, {"te')
    with pytest.raises(DataError, match=r"a.json, row 2: broken JSON \(the file ends"):
        list(TextSource([tmp_path / "a.json"]).rows())
    with pytest.raises(DataError, match=r"a.json names image files: give --image-root"):
        list(Mmc4Source([tmp_path / "a.json"], None).rows())
    with pytest.raises(DataError, match=r"cannot open .*none.jsonl \(No such file"):
        list(TextSource([tmp_path / "none.jsonl"]).rows())
