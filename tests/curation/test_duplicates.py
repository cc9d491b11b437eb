"""Which rows are dropped as copies of others, from the tables of the filter; and the stage from end to end."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from megatron_eve.curation.duplicates import (
    EXACT,
    NEAR,
    SCHEMA,
    drop_equal,
    dropped_tables,
    find_copies,
    gather,
)
from megatron_eve.curation.hashes import perceptual_hash
from megatron_eve.curation.work import Work
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.parquet import write_records
from tools.curate import main

data = pytest.importorskip("skimage.data")

NOT_COMPARED = (1 << 63, 0, 0b1111_1111 << 56)


def table(*rows: tuple[int, bytes | None, int | None, str | None]) -> pyarrow.Table:
    """A table of the filter: number, digest, perceptual hash and reason of each row."""
    schema = pyarrow.schema(
        {
            "row": pyarrow.int64(),
            "sha256": pyarrow.binary(32),
            "phash": pyarrow.uint64(),
            "reason": pyarrow.string(),
        }
    )
    return pyarrow.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema)


def digest(number: int, last: int = 0) -> bytes:
    return bytes([number]) * 31 + bytes([last])


def dropped(tables: list[pyarrow.Table], distance: int | None = 6) -> list[tuple[int, ...]]:
    """(shard, row, exact, of_shard, of_row, distance) of each dropped row."""
    rows = gather(tables, sum(map(len, tables)))
    found = []
    for shard, one in enumerate(dropped_tables(rows, find_copies(rows, distance))):
        assert one.schema == SCHEMA
        for row in one.to_pylist():
            assert row["reason"] in (EXACT, NEAR)
            found.append(
                (
                    shard,
                    row["row"],
                    int(row["reason"] == EXACT),
                    row["of_shard"],
                    row["of_row"],
                    row["distance"],
                )
            )
    return found


def test_digests_that_agree_at_their_beginning_are_not_equal() -> None:
    words = np.array([[1, 2, 3, 4], [1, 2, 3, 5], [9, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4]])
    assert drop_equal(words.astype(np.uint64)).tolist() == [-1, -1, -1, 0, 1, 0]
    assert drop_equal(np.empty((0, 4), np.uint64)).tolist() == []


def test_the_first_row_of_the_first_shard_is_kept() -> None:
    first, second = 0x0F0F_3333_5555_00FF, 0x0F0F_3333_5555_00F8  # 3 bits
    tables = [
        table((0, digest(1), first, None), (1, digest(2), 0x1234_5678_9ABC_DEF0, None)),
        table(),
        table((0, digest(3), second, None), (2, digest(1), first, None), (5, digest(4), second, None)),
    ]
    assert dropped(tables) == [(2, 0, 0, 0, 0, 3), (2, 2, 1, 0, 0, 0), (2, 5, 0, 0, 0, 3)]
    assert dropped(tables, 2) == [(2, 2, 1, 0, 0, 0), (2, 5, 0, 2, 0, 0)]
    assert dropped(tables, None) == [(2, 2, 1, 0, 0, 0)]


def test_rows_that_the_filter_dropped_or_that_have_no_one_picture_are_left_alone() -> None:
    value = 0x0F0F_3333_5555_00FF
    tables = [
        table((0, digest(1), value, "too_small"), (1, None, None, None), (2, None, None, None)),
        table((0, digest(1), value, None), (1, digest(2), None, None), (2, digest(3), None, None)),
    ]
    assert dropped(tables) == []


@pytest.mark.parametrize("value", NOT_COMPARED)
def test_plain_pictures_are_compared_as_files_only(value: int) -> None:
    tables = [table((0, digest(1), value, None), (1, digest(2), value, None), (2, digest(1), value, None))]
    assert dropped(tables) == [(0, 2, 1, 0, 0, 0)]
    rows = gather(tables, 3)
    assert find_copies(rows, 6).num_plain == 2  # of the rows that are no exact copies
    one_bit_more = value | 0b11
    assert (
        len(dropped([table((0, digest(1), one_bit_more, None), (1, digest(2), one_bit_more, None))])) == 1
    ) == (one_bit_more.bit_count() > 8)


def test_the_cut_into_shards_changes_nothing() -> None:
    random = np.random.default_rng(0)
    base = random.integers(0, 1 << 64, 40, dtype=np.uint64)
    values = np.concatenate([base, base ^ np.uint64(5), base ^ np.uint64(1 << 40), base])
    digests = [digest(number % 130) for number in range(len(values))]
    rows = [(digests[n], int(values[n])) for n in random.permutation(len(values))]

    def run(cuts: list[int]) -> list[tuple[int, ...]]:
        edges = [0, *cuts, len(rows)]
        tables = [
            table(*((n - start, *rows[n], None) for n in range(start, stop)))
            for start, stop in pairwise(edges)
        ]
        return [
            (edges[shard] + row, exact, edges[of_shard] + of_row, bits)
            for shard, row, exact, of_shard, of_row, bits in dropped(tables)
        ]

    whole = run([])
    assert {exact for _, exact, _, _ in whole} == {0, 1}
    assert run([7]) == run([1, 2, 2, 50, 159]) == whole


def test_slices_of_arrow_arrays_are_read_from_where_they_begin() -> None:
    rows = [(n, digest(n), 0x0F0F_3333_5555_0000 + (n << 20), None) for n in range(6)]
    read = gather([table(*rows).slice(2, 3)], 3)
    assert read.digest.astype("<u8").tobytes() == b"".join(digest(n) for n in (2, 3, 4))
    assert read.row.tolist() == [2, 3, 4]


def encoded(image: Image.Image, quality: int = 95) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def photos() -> list[Image.Image]:
    names = (
        "astronaut",
        "chelsea",
        "coffee",
        "rocket",
        "hubble_deep_field",
        "retina",
        "immunohistochemistry",
    )
    whole = [Image.fromarray(getattr(data, name)()) for name in names]
    return [image.resize((480, 480 * image.height // image.width)) for image in whole]


def record(name: str, picture: bytes) -> Record:
    turns = [{"from": "gpt", "value": f"<image>A picture, {name}."}]
    return Record(name, "test", "pair", [ImageFile(picture, f"{name}.jpg")], turns)


def write(folder: Path, *shards: list[Record]) -> str:
    folder.mkdir()
    for number, records in enumerate(shards):
        write_records(folder / f"{number:03d}.parquet", records)
    return str(folder / "*.parquet")


def curate(work: Path, *words: str) -> None:
    assert main([words[0], "--work", str(work), "--workers", "1", *words[1:]]) == 0


CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "exact": encoded,
    "jpeg60": lambda image: encoded(image, 60),
    "shrunk": lambda image: encoded(image.resize((image.width // 2, image.height // 2))),
    "cropped": lambda image: encoded(
        image.crop(
            (image.width // 100, image.height // 100, image.width * 99 // 100, image.height * 99 // 100)
        )
    ),
}


def planted() -> list[list[Record]]:
    """The originals in the first shard, their copies in two others."""
    originals = photos()
    copies = [
        record(f"{name}{n}", change(image))
        for name, change in CHANGES.items()
        for n, image in enumerate(originals)
    ]
    return [
        [record(f"original{n}", encoded(image)) for n, image in enumerate(originals)],
        copies[::2],
        copies[1::2],
    ]


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with planted copies in which the stage `filter` is finished; tests copy it."""
    folder = tmp_path_factory.mktemp("filtered")
    curate(folder / "work", "filter", "--input", write(folder / "shards", *planted()), "--min-side", "1")
    return folder / "work"


def test_planted_copies_are_found_and_nothing_else(
    filtered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = shutil.copytree(filtered, tmp_path / "work")
    curate(work, "duplicates")
    opened = Work.open(work)
    shards = planted()
    count = len(shards[0])
    found = {}
    for shard in (1, 2):
        for row in opened.read_table("duplicates", shard).to_pylist():
            name = shards[shard][row["row"]].id or ""
            assert row["of_shard"] == 0 and name.endswith(str(row["of_row"]))
            found[name] = row["reason"]
    assert len(opened.read_table("duplicates", 0)) == 0
    kinds = {name: [found.get(f"{name}{n}") for n in range(count)] for name in CHANGES}
    assert set(kinds["exact"]) == {EXACT} and set(kinds["jpeg60"]) == set(kinds["shrunk"]) == {NEAR}
    assert kinds["cropped"].count(NEAR) >= 0.9 * count
    kept = sum(len(opened.kept_rows(shard, "features")) for shard in range(3))
    assert kept == sum(map(len, shards)) - len(found)
    printed = capsys.readouterr().out
    assert re.search(rf"dropped +{count}  duplicate_exact: ", printed)
    page = (work / "duplicates" / "duplicates.html").read_text(encoding="utf-8")
    assert "The same file" in page and page.count("<img") >= 2 * count


def test_exact_only_keeps_what_looks_alike(filtered: Path, tmp_path: Path) -> None:
    work = shutil.copytree(filtered, tmp_path / "work")
    curate(work, "duplicates", "--exact-only")
    tables = [Work.open(work).read_table("duplicates", shard) for shard in range(3)]
    found = [row for table in tables for row in table.to_pylist()]
    assert {row["reason"] for row in found} == {EXACT} and len(found) == len(photos())


def test_a_table_without_its_columns_is_refused(
    filtered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = shutil.copytree(filtered, tmp_path / "work")
    path = work / "filter" / "00001.parquet"
    parquet.write_table(parquet.read_table(path).drop_columns(["phash"]), path)
    assert main(["duplicates", "--work", str(work)]) == 2
    printed = capsys.readouterr().err
    assert "no column phash" in printed and "run tools/curate.py filter again" in printed


def test_the_hash_of_a_plain_picture_is_one_that_is_not_compared() -> None:
    assert perceptual_hash(Image.new("RGB", (300, 200), "white")) in NOT_COMPARED
    stripes = np.tile(np.repeat(np.array([0, 255, 80, 30], np.uint8), 50)[:, None], (1, 200))
    assert perceptual_hash(Image.fromarray(stripes)).bit_count() <= 8
