"""What --input names: files and patterns, their layout, and datasets made of each."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from megatron_eve.data.errors import DataError
from megatron_eve.data.sources.recognise import input_files, open_source, recognise
from tests.data.helpers import MakeConfig, caption_row, encoded, opened, picture, run, skipped_rows, text_row

LINES: dict[str, Any] = {
    "llava": caption_row(1, "ok.jpg"),
    "mmc4": {"text_list": [], "image_info": [], "similarity_matrix": []},
    "text": {"text": "A lake."},
}


def write_tar(path: Path, keys: list[str], status: str = "success") -> bytes:
    """A shard of img2dataset; gives the picture that all of its keys have."""
    data = encoded(picture(40, 30), "JPEG")
    with tarfile.open(path, "w") as archive:
        for key in keys:
            about = json.dumps({"caption": f"Number {key}.", "url": f"http://x/{key}", "status": status})
            for suffix, content in (
                (".jpg", data),
                (".txt", f"Number {key}.".encode()),
                (".json", about.encode()),
            ):
                member = tarfile.TarInfo(key + suffix)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return data


def test_patterns_are_sorted_and_words_keep_their_order(tmp_path: Path) -> None:
    for name in ("b2.json", "b1.json", "a.json", "odd[1].json"):
        (tmp_path / name).write_text("[]")
    named = input_files([str(tmp_path / "b*.json"), str(tmp_path / "a.json"), str(tmp_path / "odd[1].json")])
    assert [path.name for path in named] == ["b1.json", "b2.json", "a.json", "odd[1].json"]


def test_what_input_cannot_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    for words, message in (
        (["x*.json"], r"--input .*x\*.json: no file matches this pattern"),
        (["x.json"], "cannot open .*x.json \\(No such file or directory\\): give --input a file"),
        (["."], r"is a folder: name its files, as in '.*/\*.json'"),
        (["a.json", "*.json"], "a.json twice: its rows would be in the dataset twice"),
    ):
        with pytest.raises(DataError, match=message):
            input_files([str(tmp_path / word) for word in words])


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("before", ["", "\n{broken\n"])
def test_lines_are_told_by_their_first_object(tmp_path: Path, name: str, before: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(before + json.dumps(LINES[name]) + "\n")
    assert recognise([path]) == name


def test_flan_is_text_and_suffixes_tell_the_others(tmp_path: Path) -> None:
    (tmp_path / "flan.jsonl").write_text(json.dumps({"inputs": "Why?", "targets": "Because."}))
    (tmp_path / "empty.jsonl").write_text("")
    for name in ("rows.json", "list.CSV", "0.tar"):
        (tmp_path / name).write_text("")
    expected = {
        "flan.jsonl": "text", "empty.jsonl": "llava", "rows.json": "llava", "list.CSV": "open_images",
        "0.tar": "webdataset",
    }  # fmt: skip
    assert {name: recognise([tmp_path / name]) for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows.pkl", "pickles are never opened"),
        (
            "rows.yaml",
            "rows.yaml: its layout is not known from its suffix; give --input-format, one of llava",
        ),
    ],
)
def test_what_is_refused_with_a_remedy(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=message):
        recognise([tmp_path / name])


@pytest.mark.parametrize(
    ("pack", "command"),
    [
        (gzip.compress, "gunzip"),
        (bz2.compress, "bunzip2"),
        (lzma.compress, "unxz"),
        (lambda data: zip_of(data), "unzip"),
        (lambda data: pyarrow.Codec("zstd").compress(data).to_pybytes(), "unzstd"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.packed", "0.tar", "list.csv"])
def test_compressed_files_are_told_by_their_first_bytes(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes], command: str
) -> None:
    (tmp_path / name).write_bytes(pack(b'{"text": "A lake."}\n'))
    with pytest.raises(DataError, match=rf"{name} is compressed: unpack it with {command}, and give --input"):
        input_files([str(tmp_path / name)])


def zip_of(data: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("rows.jsonl", data)
    return packed.getvalue()


def test_two_layouts_are_not_mixed_but_may_be_said(tmp_path: Path) -> None:
    for name in ("llava", "text"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(LINES[name]))
    words = [str(tmp_path / "*.jsonl")]
    with pytest.raises(DataError, match=r"two layouts, .*llava.jsonl \(llava\) and .*text.jsonl \(text\)"):
        open_source(words, None, None)
    assert len(list(open_source(words, "text", None).rows())) == 2
    with pytest.raises(DataError, match="--input-format csv: use one of llava"):
        open_source(words, "csv", None)


@pytest.mark.parametrize("workers", [1, 2])
def test_tar_shards_become_captions(make_config: MakeConfig, tmp_path: Path, workers: int) -> None:
    data = write_tar(tmp_path / "00001.tar", ["000010", "000011"])
    write_tar(tmp_path / "00002.tar", ["000020"], status="failed_to_download")
    write_tar(tmp_path / "00003.tar", ["000030"])
    config = make_config([], input=str(tmp_path / "*.tar"), image_root=None, workers=workers)
    info = run(config)
    assert (info.num_rows, info.num_samples, info.skipped) == (4, 3, {"download_failed": 1})
    (row,) = skipped_rows(config)
    assert (row["file"], row["row"], row["id"]) == (str(tmp_path / "00002.tar"), 1, "000020")
    dataset = opened(config)
    assert dataset.image_bytes(2) == data
    lines = [
        caption_row(n, "ok.jpg", f"Number {key}.") for n, key in enumerate(("000010", "000011", "000030"))
    ]
    same = make_config(lines, output_prefix=str(tmp_path / "same"))
    run(same)
    assert (
        Path(config.output_prefix + "_text.bin").read_bytes()
        == Path(same.output_prefix + "_text.bin").read_bytes()
    )


def test_rows_of_several_files_are_one_dataset(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config([caption_row(1, "ok.jpg", "One."), caption_row(2, "no.jpg")])
    (tmp_path / "more.jsonl").write_text(json.dumps(caption_row(3, "ok.jpg", "Three.")) + "\n5\n")
    both = make_config([caption_row(1, "ok.jpg", "One."), caption_row(2, "no.jpg")], input=(
        str(tmp_path / "data.json"), str(tmp_path / "more.jsonl")))  # fmt: skip
    info = run(both)
    assert (info.num_rows, info.num_samples) == (4, 2)
    named = [(Path(row["file"]).name, row["row"], row["reason"]) for row in skipped_rows(config)]
    assert named == [("data.json", 2, "image_missing"), ("more.jsonl", 2, "not_an_object")]


@pytest.mark.parametrize("workers", [1, 2])
def test_pictures_by_name_need_a_folder(make_config: MakeConfig, workers: int) -> None:
    config = make_config([5, caption_row(1, "ok.jpg")], image_root=None, workers=workers)
    with pytest.raises(
        DataError, match=r"data.json, row 2 names the picture ok.jpg: give its folder as --image-root"
    ):
        run(config)


def test_text_needs_no_folder(make_config: MakeConfig) -> None:
    assert run(make_config([text_row()], image_root=None, template="vicuna_v1")).num_samples == 1
