"""Codes on disk: written by several processes in any order, opened, and refused where they are not what they say."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_eve.data.errors import DataError
from megatron_eve.data.format import code_writer, file_lock
from megatron_eve.data.format.code_part import CodePart, JoinedCodes, dataset_digest, open_codes
from megatron_eve.data.format.code_writer import CodeWork, chunk_size
from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.format.merging import merge_datasets
from tests.data.helpers import write_dataset
from tests.data.tokenizing.helpers import SETTINGS, some_codes, write_codes
from tools.inspect_data import main as inspect
from tools.merge_datasets import main as merge

TOWER = {"grid": (2, 3), "depth": 4, "codebook_size": 500, "tower_sha256": "cd" * 32}


def of(dataset: str) -> dict[str, Any]:
    """What the settings of the codes of a dataset say of it."""
    opened = open_dataset(dataset)
    return {"dataset_sha256": dataset_digest(opened), "num_images": opened.info.num_images}


def test_codes_are_the_ones_that_were_written(tmp_path: Path) -> None:
    part = CodePart(write_codes(tmp_path / "one"))
    assert {path.name for path in tmp_path.iterdir()} == {"one_codes.bin", "one_codes.json"}
    data = (tmp_path / "one_codes.bin").read_bytes()
    assert len(part) == 301 and len(data) == 301 * 2 * 3 * 4 * 2
    assert part.info.sha256 == hashlib.sha256(data).hexdigest()
    for image in (0, 17, 300):
        codes = part.codes(image)
        assert codes.dtype == np.uint16 and (codes == some_codes(SETTINGS, image, image + 1)[0]).all()
        codes += 1  # a copy
        assert (part.codes(image) != codes).all()
    with pytest.raises(IndexError):
        part.codes(301)
    assert not list(part.damage())


@pytest.mark.parametrize(
    ("images", "batch", "images_of_chunk"),
    [(301, 2, 6), (3, 16, 16), (100_000, 16, 256), (100_000, 100, 300), (25_000_000, 16, 6112)],
)
def test_chunks_are_whole_batches_and_not_too_many(images: int, batch: int, images_of_chunk: int) -> None:
    assert chunk_size(replace(SETTINGS, num_images=images, micro_batch_size=batch)) == images_of_chunk


def test_processes_share_the_work_and_a_kill_costs_a_chunk(tmp_path: Path) -> None:
    """Three that take turns, of which one leaves a chunk unwritten, as a kill would; the bytes are those of one."""
    write_codes(tmp_path / "alone")
    prefix = str(tmp_path / "shared")
    works = [CodeWork(prefix, SETTINGS, overwrite=False) for _ in range(3)]
    chunks = [work.chunks() for work in works]
    killed = next(chunks[2])
    made = set[int]()
    for turn in range(1000):
        if turn == 20:
            assert works[0].finish() == (None, False)
            killed.lock.close()  # the system does so
            works[2].close()
        if (chunk := next(chunks[turn % 2], None)) is None:
            break
        assert chunk.number not in made
        made.add(chunk.number)
        damaged = [f"image {chunk.first}"] if chunk.number in (3, 40) else []
        works[turn % 2].write(chunk, some_codes(SETTINGS, chunk.first, chunk.stop), damaged)
    assert made == set(range(works[0].num_chunks)) and works[0].done_images() == 301
    info, here = works[1].finish()
    assert info is not None and here and works[0].finish() == (info, False)
    assert (info.num_damaged, info.damaged_first) == (2, ["image 18", "image 240"])
    assert (tmp_path / "shared_codes.bin").read_bytes() == (tmp_path / "alone_codes.bin").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_kill_between_two_names_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, replace_file = str(tmp_path / "one"), os.replace

    def killed_at_the_manifest(source: Path, target: Path | str) -> None:
        if str(target).endswith("_codes.json"):
            raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr(code_writer.os, "replace", killed_at_the_manifest)
    with pytest.raises(KeyboardInterrupt):
        write_codes(tmp_path / "one")
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"one_codes.json is missing: .*run the same command again"):
        CodePart(prefix)
    assert CodeWork(prefix, SETTINGS, overwrite=False).finished == CodePart(prefix).info
    assert len(list(tmp_path.iterdir())) == 2


def test_unfinished_codes_of_another_version_are_replaced_where_asked(tmp_path: Path) -> None:
    prefix = str(tmp_path / "one")
    with CodeWork(prefix, SETTINGS, overwrite=False) as work:
        next(work.chunks()).lock.close()
    settings = tmp_path / "one_codes.partial" / "settings.json"
    settings.write_text(settings.read_text().replace('"fit"', '"fitted"'))
    with pytest.raises(DataError, match="--overwrite"):
        CodeWork(prefix, SETTINGS, overwrite=False)
    with CodeWork(prefix, SETTINGS, overwrite=True) as work:
        assert work.done_images() == 0
    with CodeWork(prefix, SETTINGS, overwrite=False) as work:
        assert work.done_images() == 0


def test_other_settings_are_refused(tmp_path: Path) -> None:
    prefix = write_codes(tmp_path / "one")
    assert CodeWork(prefix, SETTINGS, overwrite=False).finished is not None
    square = replace(SETTINGS, fit="square")
    with pytest.raises(
        DataError, match=r"one_codes.json is there already, made with --fit stretch, and this comm"
    ):
        CodeWork(prefix, square, overwrite=False)
    assert not Path(f"{prefix}_codes.partial").exists()
    before = (tmp_path / "one_codes.bin").read_bytes()
    with CodeWork(prefix, square, overwrite=True) as work:
        with pytest.raises(
            DataError, match=r"is being written by another command, made with another tower \(sha256 c"
        ):
            CodeWork(prefix, replace(square, tower_sha256="ee" * 32), overwrite=True)
        assert CodeWork(prefix, SETTINGS, overwrite=False).finished is not None  # the old ones still open
        assert CodePart(prefix).info.fit == "stretch"
        for chunk in work.chunks():
            work.write(chunk, some_codes(SETTINGS, chunk.first, chunk.stop), [])
            break
    with pytest.raises(DataError, match=r"there already, made with --fit stretch"):
        CodeWork(prefix, square, overwrite=False)
    other = replace(SETTINGS, dataset_sha256="00" * 32)
    (tmp_path / "one_codes.json").unlink()
    with pytest.raises(
        DataError, match=r"holds unfinished codes, made of another dataset, .*made with --fit square"
    ):
        CodeWork(prefix, other, overwrite=False)
    with CodeWork(prefix, other, overwrite=True) as work:
        assert work.done_images() == 0
    assert (tmp_path / "one_codes.bin").read_bytes() == before


def test_a_full_disk_is_found_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(code_writer.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(
        DataError, match=r"the codes of 301 images take 0.00 GiB, and the disk of .* has 0.00 GiB left"
    ):
        write_codes(tmp_path / "one")
    assert not list(tmp_path.iterdir())


def test_a_code_that_the_codebook_has_not_is_never_written(tmp_path: Path) -> None:
    with CodeWork(str(tmp_path / "one"), SETTINGS, overwrite=False) as work:
        for chunk in work.chunks():
            codes = some_codes(SETTINGS, chunk.first, chunk.stop)
            with pytest.raises(DataError, match=r"the tower gave codes 0 to 500 for images .* has 500"):
                work.write(chunk, np.where(codes == codes.max(), 500, codes * 0), [])
            work.write(chunk, codes, [])
        with (tmp_path / "one_codes.partial" / "codes.bin").open("r+b") as file:  # damage on the disk
            file.write(b"\xff\xff")
        with pytest.raises(DataError, match=r"have a code 65,535 where the codebook has 500"):
            work.finish()
    assert not (tmp_path / "one_codes.json").exists()


def test_files_that_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes make every chunk, and both end well."""

    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(file_lock.fcntl, "flock", refuse)
    prefix = str(tmp_path / "one")
    with (
        CodeWork(prefix, SETTINGS, overwrite=False) as one,
        CodeWork(prefix, SETTINGS, overwrite=False) as two,
    ):
        late = next(two.chunks())
        for chunk in one.chunks():
            one.write(chunk, some_codes(SETTINGS, chunk.first, chunk.stop), [])
        info, _ = one.finish()
        two.write(late, some_codes(SETTINGS, late.first, late.stop), [])
        assert not list(two.chunks()) and two.finish() == (info, False) and info == CodePart(prefix).info
    assert capsys.readouterr().err.count("warning") == 1


def damage(folder: Path, name: str, what: str) -> None:
    """Damage codes in one way."""
    path = folder / f"{name}_codes.bin"
    manifest = folder / f"{name}_codes.json"
    if what == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif what == "longer":
        path.write_bytes(path.read_bytes() + b"\0\0")
    elif what == "gone":
        path.unlink()
    elif what == "version":
        manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    elif what == "field":
        manifest.write_text(manifest.read_text().replace('"depth"', '"width"'))
    else:
        manifest.write_text("{")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (
            "cut",
            r"one_codes.bin is truncated: it has 14,447 bytes where 301 images of 48 bytes are 14,448; copy it",
        ),
        ("longer", r"one_codes.bin has 14,450 bytes where 301 images"),
        (
            "gone",
            r"one_codes.bin is missing: copy it again, or make the codes again with tools/tokenize_images.py",
        ),
        ("version", r"one_codes.json is of format version 2 and this code reads 1"),
        ("field", r"one_codes.json is not what this version of tools/tokenize_images.py writes"),
        ("json", r"one_codes.json is not what this version of tools/tokenize_images.py writes"),
    ],
)
def test_damaged_files_do_not_open(tmp_path: Path, what: str, says: str) -> None:
    prefix = write_codes(tmp_path / "one")
    damage(tmp_path, "one", what)
    with pytest.raises(DataError, match=says):
        CodePart(prefix)
    with pytest.raises(DataError, match=says):
        CodeWork(prefix, SETTINGS, overwrite=False)
    assert CodeWork(prefix, SETTINGS, overwrite=True).finished is None


def test_a_run_is_refused_codes_of_another_tower(tmp_path: Path) -> None:
    part = CodePart(write_codes(tmp_path / "one"))
    part.check_tower(**TOWER)
    part.check_tower(**TOWER | {"tower_sha256": None})
    for change, says in (
        (
            {"tower_sha256": "ee" * 32},
            r"one_codes.json has codes of another tower \(sha256 cdcdcdcdcdcd..., the",
        ),
        (
            {"grid": (3, 3)},
            r"has codes of a grid of 2 x 3 and the model's tower has 3 x 3: give the tower that",
        ),
        ({"depth": 16}, r"has codes of depth 4 and the model's tower has 16: .* --overwrite"),
        ({"codebook_size": 8192}, r"has codes of a codebook of 500 and the model's tower has 8,192"),
    ):
        with pytest.raises(DataError, match=says):
            part.check_tower(**TOWER | change)


def test_a_code_above_the_codebook_is_found_when_it_is_read(tmp_path: Path) -> None:
    prefix = write_codes(tmp_path / "one")
    path = tmp_path / "one_codes.bin"
    data = bytearray(path.read_bytes())
    data[48 * 20 + 4 : 48 * 20 + 6] = (500).to_bytes(2, "little")
    path.write_bytes(data)
    part = CodePart(prefix)
    part.codes(19), part.codes(21)
    with pytest.raises(
        DataError, match=r"image 20 of .*one_codes.bin: code 500 is not below the size of the code"
    ):
        part.codes(20)
    found = dict(part.damage())
    assert list(found) == [f"image 20 of {path}", f"{prefix}_codes.json"]


def test_codes_belong_to_a_dataset(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "set", 9, 0)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    write_codes(tmp_path / "set", **of(data))
    assert {path: path.read_bytes() for path in before} == before
    dataset = open_dataset(data)
    assert len(open_codes(dataset)) == dataset.info.num_images
    write_dataset(tmp_path / "set", 9, 1)
    with pytest.raises(
        DataError, match=r"set_codes.json is of another dataset than .*set_dataset.json, or that was"
    ):
        open_codes(open_dataset(data))
    other = open_dataset(write_dataset(tmp_path / "other", 12, 0))
    with pytest.raises(DataError, match=r"set_codes.json is of 9 images and .*other_dataset.json has"):
        open_codes(other, data)
    with pytest.raises(DataError, match=r"other_codes.json is missing: .* has no codes"):
        open_codes(other)


def test_an_older_dataset_without_a_digest_has_a_fingerprint(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "set", 5, 0)
    path = tmp_path / "set_dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"content_sha256": ""}))
    digest = dataset_digest(open_dataset(data))
    assert len(digest) == 64
    merge_datasets(str(tmp_path / "all"), [data, write_dataset(tmp_path / "other", 5, 1)])
    assert dataset_digest(open_dataset(tmp_path / "all")) not in ("", digest)


def test_a_merged_dataset_has_the_codes_of_its_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [write_dataset(tmp_path / name, 5, seed) for seed, name in enumerate(("a", "b"))]
    write_codes(tmp_path / "a", **of(names[0]))
    everything = str(tmp_path / "all")
    assert merge(["--output-prefix", everything, *names]) == 0
    assert (
        f"warning: {names[1]} have no codes, and others have: {everything} has none"
        in capsys.readouterr().err
    )
    with pytest.raises(DataError, match=r"b_codes.json is missing"):
        open_codes(open_dataset(everything))
    write_codes(tmp_path / "b", fit="square", **of(names[1]))
    assert merge(["--output-prefix", everything, *names, "--overwrite"]) == 0
    assert "codes" not in capsys.readouterr().err
    codes = open_codes(open_dataset(everything))
    parts = [CodePart(name) for name in names]
    assert isinstance(codes, JoinedCodes) and len(codes) == sum(map(len, parts)) == 10
    for image in range(10):
        assert (codes.codes(image) == parts[image // 5].codes(image % 5)).all()
    with pytest.raises(IndexError):
        codes.codes(10)
    with pytest.raises(DataError, match=r"a_codes.json has codes of depth 4"):
        codes.check_tower(**TOWER | {"depth": 5})
    write_codes(tmp_path / "all", **of(everything))  # of its own
    assert isinstance(open_codes(open_dataset(everything)), CodePart)
    for path in tmp_path.glob("b_codes*"):
        path.unlink()
    write_codes(tmp_path / "b", tower_sha256="ee" * 32, **of(names[1]))
    assert merge(["--output-prefix", everything, *names, "--overwrite"]) == 2
    assert "b_codes.json has tower_sha256 eeeeeeeeeeee... and" in capsys.readouterr().err


def test_inspection_shows_and_checks_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path / "set", 5, 0)
    assert inspect([data, "--check", "--workers", "1"]) == 0
    assert "codes " not in capsys.readouterr().out
    write_codes(tmp_path / "set", **of(data))
    page = ["--output-dir", str(tmp_path / "look"), "--sample", "0"]
    assert inspect([data, "--check", "--workers", "1", *page]) == 0
    assert f"{data}_codes.bin: 2 x 3 x 4 of each image, below 500; fit stretch" in capsys.readouterr().out
    assert "_codes.bin: 2 x 3 x 4 of each image" in (tmp_path / "look" / "index.html").read_text()
    path = tmp_path / "set_codes.bin"
    path.write_bytes(b"\xff\xff" + path.read_bytes()[2:])
    assert inspect([data, "--check", "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert f"damaged   image 0 of {path}: code 65,535 is not below" in out and "has damage: 2 found" in out
    damage(tmp_path, "set", "cut")
    assert inspect([data, "--check", "--workers", "1"]) == 1
    assert "set_codes.bin is truncated" in capsys.readouterr().out
    assert inspect([data, *page]) == 0
    assert "set_codes.bin is truncated" in (tmp_path / "look" / "index.html").read_text()
    for name in ("set_codes.bin", "set_codes.json"):
        (tmp_path / name).rename(tmp_path / f"else{name[3:]}")
    assert inspect([data, "--check", "--codes", str(tmp_path / "else")]) == 1
    assert inspect([data, "--check", "--codes", data]) == 2
    assert f"--codes {data}: {data}_codes.json is missing" in capsys.readouterr().err
