"""OpenImages: its CSV with the published columns, pictures in folders below a root."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.reasons import REASONS
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.image_files import read_image_file
from megatron_eve.data.sources.open_images import OpenImagesSource
from tests.data.helpers import encoded, picture

HEAD = "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize"
HEAD += ",OriginalMD5,Thumbnail300KURL"
JPEG = encoded(picture(32, 24), "JPEG")
ONE, TWO = "000060e3121c7305", "00040873712ddae1"


def line(name: str, title: str = "Sunset", rotation: str | None = "") -> str:
    text = f"{name},train,https://example.com/o.jpg,https://example.com/p,https://creativecommons.org/licenses/by/2.0/"
    text += f",https://example.com/ann,Ann,{title},4243203,q1yRhhHYtXfBWYUVO0gD3A==,"
    return text if rotation is None else f"{text},{rotation}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two pictures, one in the root and one in a folder of EVE's tree, and the second once more further down."""
    folder = tmp_path / "photos"
    for name in (f"{ONE}.jpg", f"V6Train1/{TWO}.jpg", f"V6Train2/{TWO}.jpg", "V6Train2/other.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(JPEG)
    return folder


def read(path: Path, root: Path, *lines: str, head: str = HEAD + ",Rotation") -> list[Record | str]:
    path.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    worker = OpenImagesSource([path], str(root))
    found: list[Record | str] = []
    for row in OpenImagesSource([path], str(root)).rows():
        try:
            found.append(worker.record(row))
        except SkipRow as skip:
            assert skip.reason in REASONS
            found.append(skip.reason)
    return found


def test_pictures_and_what_the_csv_says_of_them(tmp_path: Path, root: Path) -> None:
    (tmp_path / "oid").mkdir()
    csv = tmp_path / "oid" / "train.csv"
    lines = [line(ONE, '"Sunset, ""Venice""\nin May"', "270.0"), line(TWO, "", "")]
    one, two = read(csv, root, *lines)
    assert one == Record(
        id=ONE,
        source="oid/train.csv",
        kind="pair",
        images=[ImageFile(path=f"{ONE}.jpg")],
        turns=[{"from": "gpt", "value": "<image>"}],
        meta={
            "Subset": "train",
            "OriginalURL": "https://example.com/o.jpg",
            "OriginalLandingURL": "https://example.com/p",
            "License": "https://creativecommons.org/licenses/by/2.0/",
            "AuthorProfileURL": "https://example.com/ann",
            "Author": "Ann",
            "Title": 'Sunset, "Venice"\nin May',
            "OriginalSize": "4243203",
            "OriginalMD5": "q1yRhhHYtXfBWYUVO0gD3A==",
            "Rotation": 270,
        },
    )
    assert isinstance(two, Record) and two.images == [ImageFile(path=f"V6Train1/{TWO}.jpg")]
    assert "Rotation" not in two.meta and "Title" not in two.meta
    assert read_image_file(str(root), f"V6Train1/{TWO}.jpg") == JPEG


def test_a_file_of_before_rotation(tmp_path: Path, root: Path) -> None:
    (record,) = read(tmp_path / "a.csv", root, line(ONE, rotation=None), head="\ufeff" + HEAD)
    assert isinstance(record, Record) and record.id == ONE and "Rotation" not in record.meta


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (line("ffffffffffffffff"), "image_missing"),
        (line("other"), "image_missing"),  # ids have 16 hexadecimal digits
        (line("../../../etc/pass"), "image_missing"),
        (line(""), "image_missing"),
        (line(ONE, rotation=None), "csv_fields"),
        (line(ONE, "a, b"), "csv_fields"),
        ("x", "csv_fields"),
    ],
)
def test_rows_that_are_left_out_and_their_neighbours(
    tmp_path: Path, root: Path, text: str, reason: str
) -> None:
    found = read(tmp_path / "a.csv", root, line(ONE), text, line(TWO))
    assert [type(found[0]), found[1], type(found[2])] == [Record, reason, Record]


def test_a_title_that_is_not_unicode_and_an_empty_line(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f"{HEAD},Rotation\n\n{line(ONE, 'caf?')}\r\n".encode().replace(b"caf?", b"caf\xe9"))
    source = OpenImagesSource([path], str(root))
    (row,) = source.rows()
    assert source.record(row).meta["Title"] == "caf\\xe9"
    assert source.position == source.num_bytes


def test_files_and_folders_that_stop_the_command(tmp_path: Path, root: Path) -> None:
    def rows(text: str, image_root: str | None) -> None:
        (tmp_path / "a.csv").write_text(text)
        list(OpenImagesSource([tmp_path / "a.csv"], image_root).rows())

    good = f"{HEAD},Rotation\n{line(ONE)}\n"
    with pytest.raises(
        DataError, match=r"a.csv is not a CSV of OpenImages: its first line has no column ImageID"
    ):
        rows("id,url\n1,2\n", str(root))
    with pytest.raises(DataError, match=r"a.csv is not a CSV of OpenImages"):
        rows("", str(root))
    with pytest.raises(
        DataError, match=r"a.csv, row 2: the CSV cannot be read past this .*a quote may be missing"
    ):
        rows(good + line(ONE, '"Sunset'), str(root))
    with pytest.raises(DataError, match=r"a.csv, row 2: .*field larger than field limit"):
        rows(good + line(ONE, '"' + "x" * 200_000), str(root))
    with pytest.raises(DataError, match=r"a.csv names images: give --image-root"):
        rows(good, None)
    with pytest.raises(DataError, match=r"--image-root .*none is not a folder"):
        rows(good, str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no OpenImages file \(16 hexadecimal digits and .jpg\)"):
        rows(good, str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"cannot open .*b.csv"):
        list(OpenImagesSource([tmp_path / "b.csv"], str(root)).rows())


def test_the_folder_is_walked_once_and_a_row_costs_little(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"{HEAD},Rotation\n" + f"{line(ONE)}\n{line(TWO)}\n" * 2000)
    walks = []
    walk = __import__("os").walk
    monkeypatch.setattr("os.walk", lambda *given: walks.append(given) or walk(*given))
    source = OpenImagesSource([path, path], str(root))
    begin = time.process_time()
    assert sum(row.problem is None for row in source.rows()) == 8000
    cost = (time.process_time() - begin) / 8000
    assert cost < 0.2e-3, f"{cost * 1e3:.3f} ms a row"
    assert len(walks) == 1
