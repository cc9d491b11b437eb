"""OpenImages, from its list of URLs and pictures in the folders of EVE's tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_eve.curation.preparing.open_images import OpenImages
from megatron_eve.data.errors import DataError
from megatron_eve.data.schema import ImageFile, Record
from tests.curation.preparing.helpers import jpeg, records, run, skipped

HEAD = (
    "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,OriginalMD5,"
    "Thumbnail300KURL,Rotation"
)
BY = "https://creativecommons.org/licenses/by/2.0/"
ONE, TWO, THREE = "000060e3121c7305", "00040873712ddae1", "0004d3ddf1ec5b45"


def line(name: str, subset: str, title: str, rotation: str, license_url: str = BY) -> str:
    return (
        f"{name},{subset},https://live.example/{name}_o.jpg,https://www.example/photos/{name},{license_url},"
        f"https://www.example/people/ann/,Ann,{title},4243203,q1yRhhHYtXfBWYUVO0gD3A==,"
        f"https://c1.example/{name}_z.jpg,{rotation}"
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two pictures; a third one is listed and not there."""
    folder = tmp_path / "openimages"
    (folder / "V6Train1").mkdir(parents=True)
    (folder / "V6Train2").mkdir()
    (folder / "V6Train1" / f"{ONE}.jpg").write_bytes(jpeg(1))
    (folder / "V6Train2" / f"{TWO}.jpg").write_bytes(jpeg(2))
    lines = [
        line(ONE, "train", '"Sunset, Venice"', "90.0"),
        line(THREE, "train", "Gone", ""),
        line(TWO, "train", "", ""),
    ]
    (folder / "train-images-boxable-with-rotation.csv").write_text("\n".join([HEAD, *lines]) + "\n")
    return folder


def expected(name: str, seed: int, folder: str, more: dict[str, object]) -> Record:
    meta: dict[str, object] = {
        "Subset": "train",
        "OriginalURL": f"https://live.example/{name}_o.jpg",
        "OriginalLandingURL": f"https://www.example/photos/{name}",
        "License": BY,
        "AuthorProfileURL": "https://www.example/people/ann/",
        "Author": "Ann",
        "OriginalSize": "4243203",
        "OriginalMD5": "q1yRhhHYtXfBWYUVO0gD3A==",
        "Thumbnail300KURL": f"https://c1.example/{name}_z.jpg",
        "source_file": "train-images-boxable-with-rotation.csv",
    }
    images = [ImageFile(jpeg(seed), f"{folder}/{name}.jpg")]
    return Record(name, "openimages", "pair", images, [{"from": "gpt", "value": "<image>"}], meta | more)


def test_pictures_with_license_author_and_an_unapplied_rotation(tmp_path: Path, source: Path) -> None:
    found = run(OpenImages(source), tmp_path / "out")
    assert records(tmp_path / "out") == [
        expected(ONE, 1, "V6Train1", {"Title": "Sunset, Venice", "Rotation": 90}),
        expected(TWO, 2, "V6Train2", {}),
    ]
    assert [reason for _, reason in skipped(tmp_path / "out")] == ["image_missing"]
    assert found.licenses == {BY: 2}


def test_rows_and_files_of_other_splits_are_left_out(tmp_path: Path, source: Path) -> None:
    train = source / "train-images-boxable-with-rotation.csv"
    train.write_text("\n".join([HEAD, line(ONE, "train", "", ""), line(TWO, "test", "", "")]) + "\n")
    (source / "validation-images-with-rotation.csv").write_text(
        "\n".join([HEAD, line(TWO, "validation", "", "")]) + "\n"
    )
    found = run(OpenImages(source), tmp_path / "out")
    assert [record.id for record in records(tmp_path / "out")] == [ONE]
    assert [reason for _, reason in skipped(tmp_path / "out")] == ["eval_split"]
    assert found.files_left_out == ["validation-images-with-rotation.csv"]
    asked = run(OpenImages(source, allow_eval_splits=True), tmp_path / "asked")
    assert [record.id for record in records(tmp_path / "asked")] == [ONE, TWO, TWO]
    assert not asked.files_left_out and not asked.skipped


def test_other_csv_files_of_openimages_are_not_read(tmp_path: Path, source: Path) -> None:
    (source / "oidv6-train-annotations-bbox.csv").write_text(
        "ImageID,Source,LabelName\n" + f"{ONE},xclick,/m/01g317\n"
    )
    (source / "class-descriptions.csv").write_text("/m/01g317,Person\n")
    assert run(OpenImages(source), tmp_path / "out").rows == 2
    (source / "train-images-boxable-with-rotation.csv").unlink()
    with pytest.raises(
        DataError, match="has no CSV with the columns ImageID and OriginalURL: openimages expects"
    ):
        run(OpenImages(source), tmp_path / "other")
