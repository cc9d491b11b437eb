"""MMC4, as documents and as pairs, from lines with the published keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.curation.preparing.mmc4 import Mmc4, Mmc4Pairs
from megatron_eve.data.errors import DataError
from megatron_eve.data.schema import ImageFile, Record
from tests.curation.preparing.helpers import jpeg, records, run, skipped


def document(*pictures: tuple[str, int], sentences: int = 3) -> dict[str, Any]:
    """A line with pictures (name, matched sentence)."""
    return {
        "text_list": [f"Sentence {number}." for number in range(sentences)],
        "url": "http://pages.example/48.html",
        "could_have_url_duplicate": 0,
        "similarity_matrix": [[0.25] * sentences for _ in pictures],
        "image_info": [
            {
                "image_name": name,
                "raw_url": f"http://pictures.example/{name}",
                "matched_text_index": place,
                "matched_sim": 0.3 + number / 100,
                "face_detections": None,
            }
            for number, (name, place) in enumerate(pictures)
        ],
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four documents: of two pictures, of one that is not there and one that is, of none, and a broken line."""
    folder = tmp_path / "mmc4"
    (folder / "images").mkdir(parents=True)
    for number, name in enumerate(("b9040a0dbb22.jpg", "db1c21bc8474.jpg", "0aab51e9a3c4.png"), start=1):
        (folder / "images" / name).write_bytes(jpeg(number))
    lines = [
        json.dumps(document(("b9040a0dbb22.jpg", 2), ("db1c21bc8474.jpg", 1))),
        json.dumps(document(("dead00000000.jpg", 0), ("0aab51e9a3c4.png", 0), sentences=2)),
        json.dumps(document(sentences=1)),
        '{"text_list": ["A cut',
    ]
    (folder / "docs_shard_7_v3.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def meta(**more: Any) -> dict[str, Any]:
    head = {"url": "http://pages.example/48.html"}
    return head | more | {"source_file": "docs_shard_7_v3.jsonl", "license": "ODC-BY"}


def test_documents_with_pictures_in_front_of_their_sentences(tmp_path: Path, source: Path) -> None:
    found = run(Mmc4(source), tmp_path / "out")
    one = Record(
        id="docs_shard_7_v3:1",
        source="mmc4",
        kind="interleaved",
        images=[ImageFile(jpeg(2), "db1c21bc8474.jpg"), ImageFile(jpeg(1), "b9040a0dbb22.jpg")],
        turns=[{"from": "gpt", "value": "Sentence 0.<image>Sentence 1.<image>Sentence 2."}],
        meta=meta(
            raw_url=["http://pictures.example/db1c21bc8474.jpg", "http://pictures.example/b9040a0dbb22.jpg"],
            matched_sim=[0.31, 0.3],
        ),
    )
    two = Record(
        id="docs_shard_7_v3:2",
        source="mmc4",
        kind="interleaved",
        images=[ImageFile(jpeg(3), "0aab51e9a3c4.png")],
        turns=[{"from": "gpt", "value": "<image>Sentence 0. Sentence 1."}],
        meta=meta(raw_url=["http://pictures.example/0aab51e9a3c4.png"], matched_sim=[0.31]),
    )
    three = Record(
        id="docs_shard_7_v3:3",
        source="mmc4",
        kind="interleaved",
        images=[],
        turns=[{"from": "gpt", "value": "Sentence 0."}],
        meta=meta(raw_url=[], matched_sim=[]),
    )
    assert records(tmp_path / "out") == [one, two, three]
    assert skipped(tmp_path / "out") == [("docs_shard_7_v3:4", "broken_json")]
    assert (found.images, found.images_missing) == (3, 1)


def test_pairs_of_a_picture_and_its_matched_sentence(tmp_path: Path, source: Path) -> None:
    found = run(Mmc4Pairs(source), tmp_path / "out")

    def pair(name: str, seed: int, file: str, text: str, similarity: float) -> Record:
        return Record(
            id=f"docs_shard_7_v3:{name}",
            source="mmc4_pairs",
            kind="pair",
            images=[ImageFile(jpeg(seed), file)],
            turns=[{"from": "gpt", "value": f"<image>{text}"}],
            meta=meta(raw_url=f"http://pictures.example/{file}", matched_sim=similarity),
        )

    assert records(tmp_path / "out") == [
        pair("1:0", 1, "b9040a0dbb22.jpg", "Sentence 2.", 0.3),
        pair("1:1", 2, "db1c21bc8474.jpg", "Sentence 1.", 0.31),
        pair("2:1", 3, "0aab51e9a3c4.png", "Sentence 0.", 0.31),
    ]
    assert skipped(tmp_path / "out") == [
        ("docs_shard_7_v3:2:0", "image_missing"),
        ("docs_shard_7_v3:3:0", "no_image"),
        ("docs_shard_7_v3:4:0", "broken_json"),
    ]
    assert found.rows_read == 6


def test_a_sentence_with_the_name_of_a_key_is_no_picture(tmp_path: Path, source: Path) -> None:
    fields = document(("b9040a0dbb22.jpg", 0), sentences=1)
    fields["text_list"] = ['The key "image_name": of a line, and <image>.']
    (source / "docs_shard_7_v3.jsonl").write_text(json.dumps(fields) + "\n")
    found = run(Mmc4Pairs(source), tmp_path / "out")
    (record,) = records(tmp_path / "out")
    assert record.turns == [{"from": "gpt", "value": '<image>The key "image_name": of a line, and <IMAGE>.'}]
    assert found.rows_read == 1 and found.changes == {"literal_image": 1}


@pytest.mark.parametrize("place", [3, -1, None, True])
def test_a_sentence_that_does_not_exist(tmp_path: Path, source: Path, place: object) -> None:
    fields = document(("b9040a0dbb22.jpg", 0), ("db1c21bc8474.jpg", 1))
    fields["image_info"][1]["matched_text_index"] = place
    (source / "docs_shard_7_v3.jsonl").write_text(json.dumps(fields) + "\n")
    run(Mmc4Pairs(source), tmp_path / "out")
    assert skipped(tmp_path / "out") == [("docs_shard_7_v3:1:1", "matched_text_index")]


def test_what_is_missing_is_named(tmp_path: Path, source: Path) -> None:
    (source / "images").rename(source / "pictures")
    with pytest.raises(DataError, match="has no folder images/: mmc4 expects docs_shard_"):
        run(Mmc4(source), tmp_path / "out")
    (source / "docs_shard_7_v3.jsonl").rename(source / "docs_shard_7_v2.jsonl.zip")
    with pytest.raises(DataError, match="zip is packed: unpack such files with unzip"):
        run(Mmc4(source), tmp_path / "out")


def test_merged_shards_of_vila_are_never_opened(tmp_path: Path) -> None:
    class Opened:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    import pickle

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "docs_shard_7_v3.pkl").write_bytes(pickle.dumps(Opened()))
    with pytest.raises(DataError, match=r"pickles are there, and are never opened, as they can run code"):
        run(Mmc4(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "ran").exists()
