"""COYO-700M: shards of img2dataset, the published metadata, and VILA's selection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from megatron_eve.curation.preparing.coyo import Coyo
from megatron_eve.curation.preparing.coyo_metadata import CoyoSelection
from megatron_eve.data.errors import DataError
from megatron_eve.data.schema import ImageFile, Record
from tests.curation.preparing.helpers import jpeg, records, run, skipped, write_tar

PART = "part-{:05d}-17da4908-939c-46e5-91d0-15f256041956-c000.snappy.parquet"
SCORES: dict[str, Any] = {
    "image_phash": "e9e90c24f1d9c674", "text_length": 63, "word_count": 10, "num_tokens_bert": 14,
    "num_tokens_gpt": 18, "num_faces": 0, "nsfw_score_opennsfw2": 0.25, "nsfw_score_gantman": 0.5,
    "watermark_score": 0.125, "aesthetic_score_laion_v2": 7.5,
}  # fmt: skip


def metadata(number: int, name: int, similarities: tuple[float, float] = (0.25, 0.5)) -> dict[str, Any]:
    """A row of the metadata."""
    return {
        "id": name, "url": f"https://pictures.example/{number}.jpg", "text": f"a car, number {number}",
        "width": 600, "height": 300, **SCORES,
        "clip_similarity_vitb32": similarities[0], "clip_similarity_vitl14": similarities[1],
    }  # fmt: skip


def write_part(folder: Path, number: int, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    types = {"clip_similarity_vitb32": pyarrow.float32(), "clip_similarity_vitl14": pyarrow.float32()}
    schema = pyarrow.schema(
        [(name, types.get(name, pyarrow.array([value]).type)) for name, value in rows[0].items()]
    )
    table = pyarrow.Table.from_pylist(rows, schema)
    parquet.write_table(table, folder / PART.format(number), row_group_size=2)


def members(number: int, **more: Any) -> dict[str, bytes]:
    """The three members of a picture, whose JSON has img2dataset's keys."""
    key = f"{number:09d}"
    fields = {
        "url": f"https://pictures.example/{number}.jpg", "caption": f"a car, number {number}", "key": key,
        "status": "success", "error_message": None, "width": 32, "height": 24, "original_width": 600,
        "original_height": 300, "exif": "{}", "sha256": f"{number:064x}", **more,
    }  # fmt: skip
    return {
        f"{key}.jpg": jpeg(number),
        f"{key}.txt": fields["caption"].encode(),
        f"{key}.json": json.dumps(fields).encode(),
    }


def expected(number: int, name: str, scores: dict[str, Any]) -> Record:
    meta = {
        "url": f"https://pictures.example/{number}.jpg", "width": 32, "height": 24, "original_width": 600,
        "original_height": 300, "sha256": f"{number:064x}", **scores, "source_file": "00000.tar",
    }  # fmt: skip
    turns = [{"from": "gpt", "value": f"<image>a car, number {number}"}]
    return Record(name, "coyo", "pair", [ImageFile(jpeg(number), f"{number:09d}.jpg")], turns, meta)


SIMILAR = {"clip_similarity_vitb32": 0.25, "clip_similarity_vitl14": 0.5}


@pytest.mark.parametrize("by_id", [True, False])
def test_rows_are_joined_with_their_scores(tmp_path: Path, by_id: bool) -> None:
    ids = {0: 2559800550877, 1: 8, 2: 3221225511175}
    rows: dict[str, bytes] = {}
    for number in (2, 0, 3, 1):  # in another order than the metadata, which lacks number 3
        rows |= members(number, **({"id": ids.get(number, 99)} if by_id else {}))
    write_tar(tmp_path / "in" / "webdataset" / "00000.tar", rows)
    other = metadata(0, 5) | {"text": "another text of this picture", "num_faces": 9}
    write_part(tmp_path / "in" / "parquet", 0, [other, metadata(0, ids[0]), metadata(1, ids[1])])
    write_part(tmp_path / "in" / "parquet", 1, [metadata(2, ids[2])])
    run(Coyo(tmp_path / "in"), tmp_path / "out")
    assert records(tmp_path / "out") == [
        expected(number, str(ids[number]), SCORES | SIMILAR) for number in (2, 0, 1)
    ]
    assert [reason for _, reason in skipped(tmp_path / "out")] == ["not_in_metadata"]


def test_without_metadata_rows_have_what_img2dataset_kept(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "00000.tar", members(0, id=12, watermark_score=0.125) | members(1))
    run(Coyo(tmp_path / "in"), tmp_path / "out")
    assert records(tmp_path / "out") == [
        expected(0, "12", {"watermark_score": 0.125}),
        expected(1, "000000001", {}),
    ]


def test_an_id_that_a_column_cannot_hold(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "00000.tar", members(0, id="half \ud83d", note="\ud83d"))
    run(Coyo(tmp_path / "in"), tmp_path / "out")
    (record,) = records(tmp_path / "out")
    assert record.id == "half ?" and record.meta["note"] == "\ud83d"


def test_an_id_of_another_data_set_is_not_joined(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "00000.tar", members(0, id=7) | members(1, id=8))
    write_part(tmp_path / "in", 0, [metadata(5, 7), metadata(1, 8)])
    run(Coyo(tmp_path / "in"), tmp_path / "out")
    assert [record.id for record in records(tmp_path / "out")] == ["8"]
    assert skipped(tmp_path / "out") == [("000000000", "not_in_metadata")]


def test_the_selection_of_vila(tmp_path: Path) -> None:
    """The best 20 % of all rows of each file, here 2 of 10 and 1 of 5, of which the sum is above 0.6."""
    sums = [0.5, 0.75, 0.625, 0.9375, 0.625, 0.8125, 0.5, 0.25, 0.125, 0.5, *(0.5625, 0.59375, 0.5, 0.5, 0.5)]
    rows: dict[str, bytes] = {}
    for number in range(15):
        rows |= members(number, id=number)
    write_tar(tmp_path / "in" / "00000.tar", rows)
    table = [metadata(number, number, (total - 0.25, 0.25)) for number, total in enumerate(sums)]
    write_part(tmp_path / "in", 0, table[:10])
    write_part(tmp_path / "in", 1, table[10:])
    found = run(Coyo(tmp_path / "in", min_clip_similarity=0.6, best_share=0.2), tmp_path / "out")
    assert [record.id for record in records(tmp_path / "out")] == ["3", "5"]
    assert found.skipped == {"not_selected": 13}
    share = run(Coyo(tmp_path / "in", best_share=0.2), tmp_path / "share")
    assert [record.id for record in records(tmp_path / "share")] == ["3", "5", "11"] and share.rows == 3


def test_selected_rows_of_a_file() -> None:
    sums = np.array([0.7, np.nan, 0.6, 0.9, 0.7, 0.7], dtype=np.float32)
    assert CoyoSelection().rows(sums).tolist() == [0, 1, 2, 3, 4, 5]
    assert CoyoSelection(0.6).rows(sums).tolist() == [0, 3, 4, 5]  # larger, not equal
    assert CoyoSelection(None, 0.5).rows(sums).tolist() == [0, 3, 4]  # the first of equal ones
    assert CoyoSelection(0.8, 0.5).rows(sums).tolist() == [3]
    assert CoyoSelection(None, 0.1).rows(sums).tolist() == []


def test_bad_metadata_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "00000.tar", members(0, id=1))
    with pytest.raises(
        DataError, match=r"has no part-\*.parquet: --min-clip-similarity and --best-share read"
    ):
        run(Coyo(tmp_path / "in", best_share=0.2), tmp_path / "out")
    row = metadata(0, 1)
    del row["clip_similarity_vitl14"]
    write_part(tmp_path / "in", 0, [row])
    with pytest.raises(DataError, match="parquet has no column clip_similarity_vitl14: give the metadata"):
        run(Coyo(tmp_path / "in"), tmp_path / "out")
    (tmp_path / "in" / PART.format(0)).write_bytes(b"PAR1 and no more")
    with pytest.raises(
        DataError, match=r"parquet is not a complete parquet file .*: copy or download it again"
    ):
        run(Coyo(tmp_path / "in"), tmp_path / "other")
