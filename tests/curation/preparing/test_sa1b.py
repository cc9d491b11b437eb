"""SA-1B, from archives in its published layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_eve.curation.preparing.sa1b import Sa1b
from megatron_eve.data.errors import DataError
from megatron_eve.data.schema import ImageFile, Record
from tests.curation.preparing.helpers import jpeg, manifest, records, run, skipped, write_tar


def of(number: int) -> dict[str, bytes]:
    """The two members of a picture."""
    image = {"image_id": number, "width": 32, "height": 24, "file_name": f"sa_{number}.jpg"}
    masks = [
        {
            "id": 1,
            "bbox": [0, 0, 4, 4],
            "area": 16,
            "segmentation": {"size": [24, 32], "counts": "x" * 70_000},
        }
    ]
    content = json.dumps({"image": image, "annotations": masks}).encode()
    return {f"sa_{number}.jpg": jpeg(number), f"sa_{number}.json": content}


def expected(number: int, file: str) -> Record:
    return Record(
        id=f"sa_{number}",
        source="sa1b",
        kind="pair",
        images=[ImageFile(jpeg(number), f"sa_{number}.jpg")],
        turns=[{"from": "gpt", "value": "<image>"}],
        meta={
            "image_id": number,
            "width": 32,
            "height": 24,
            "file_name": f"sa_{number}.jpg",
            "source_file": file,
            "license": "SA-1B Research License",
        },
    )


def test_pictures_and_what_is_kept_beside_them(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "sa_000000.tar", of(1) | of(2) | {"sa_3.json": of(3)["sa_3.json"]})
    write_tar(tmp_path / "in" / "sa_000001.tar", of(4))
    found = run(Sa1b(tmp_path / "in"), tmp_path / "out")
    assert records(tmp_path / "out") == [
        expected(1, "sa_000000.tar"),
        expected(2, "sa_000000.tar"),
        expected(4, "sa_000001.tar"),
    ]
    assert skipped(tmp_path / "out") == [(None, "key_without_picture")]
    assert (found.rows_read, found.rows, found.images) == (4, 3, 3)
    assert manifest(tmp_path / "out")["licenses"] == {"SA-1B Research License": 3}


def test_pictures_in_a_folder_of_the_archive_have_the_same_ids(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "in" / "sa_000020.tar", {f"./sa_000020/{name}": data for name, data in of(7).items()}
    )
    run(Sa1b(tmp_path / "in"), tmp_path / "out")
    assert [record.id for record in records(tmp_path / "out")] == ["sa_7"]


def test_archives_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"is not a folder: name that of the download, with the archives sa_000000"
    ):
        run(Sa1b(tmp_path / "in"), tmp_path / "out")
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match=r"in has no sa_\*\.tar: sa1b expects the archives sa_000000\.tar"):
        run(Sa1b(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
