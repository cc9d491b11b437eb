"""Parquet files as a source: shards of records, and data sets as the hub has them; and what is wrong with some."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.parquet import ARROW_SCHEMA, ParquetSource, write_records
from tests.data.helpers import MakeConfig, encoded, opened, picture, run, skipped_rows, turns

PICTURE = encoded(picture(40, 30), "JPEG")
TURNS = turns("<image>\nWhat is it?", "A car.")


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def records(path: Path) -> list[Record | str]:
    """Each row's record, or the reason why it is none."""
    source = ParquetSource([path])
    found: list[Record | str] = []
    for row in source.rows():
        try:
            found.append(source.record(row))
        except SkipRow as skip:
            found.append(skip.reason)
    assert source.position == source.num_bytes
    return found


def test_records_there_and_back(tmp_path: Path) -> None:
    written = [
        Record("a", "coyo/0", "pair", [ImageFile(PICTURE, "a.jpg", "ab" * 32)],
               [{"from": "gpt", "value": "<image>A car."}],
               {"url": "http://x", "similarity": 0.25, "tags": ["x"], "nothing": None}),
        Record(None, "mmc4", "interleaved", [ImageFile(path="b.jpg"), ImageFile(PICTURE)],
               [{"from": "gpt", "value": "One <image> two 猫 <image>"}]),
        Record("c", "flan", "text", [], [{"from": "gpt", "value": "A text."}]),
        Record("d", "llava", "conversation", [ImageFile(path="d.jpg")], TURNS),
    ]  # fmt: skip
    assert write_records(tmp_path / "0.parquet", written) == 4
    assert records(tmp_path / "0.parquet") == written
    assert parquet.read_schema(tmp_path / "0.parquet").equals(ARROW_SCHEMA)
    assert [path.name for path in tmp_path.iterdir()] == ["0.parquet"]


def test_a_shard_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield Record("a", "x", "text", [], [{"from": "gpt", "value": "A."}])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(tmp_path / "0.parquet", broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "image", [PICTURE, {"bytes": PICTURE, "path": "a.jpg"}, {"bytes": None, "path": "a.jpg"}, "a.jpg"]
)
@pytest.mark.parametrize("caption", ["caption", "text", "TEXT"])
def test_a_picture_and_a_caption_are_a_pair(tmp_path: Path, image: Any, caption: str) -> None:
    columns = {
        "id": [7],
        "image": [image],
        caption: ["A <image> car."],
        "similarity": [0.5],
        "size": [[1, 2]],
    }
    (record,) = records(write(tmp_path / "a.parquet", columns))
    assert isinstance(record, Record)
    assert (record.kind, record.id, record.meta) == ("pair", "7", {"similarity": 0.5})
    assert record.turns == [{"from": "gpt", "value": "<image>A <IMAGE> car."}]
    data, path = (image.get("bytes"), image["path"]) if isinstance(image, dict) else (None, None)
    data, path = (
        (image, None) if isinstance(image, bytes) else (data, image if isinstance(image, str) else path)
    )
    assert record.images == [ImageFile(data, path)]


def test_conversations_with_pictures_and_without(tmp_path: Path) -> None:
    columns = {
        "conversations": [TURNS, turns("Why?", "So.")],
        "images": pyarrow.array([[{"bytes": PICTURE, "path": None}], None]),
    }
    first, second = records(write(tmp_path / "a.parquet", columns))
    assert isinstance(first, Record) and isinstance(second, Record)
    assert (first.kind, first.turns, first.images) == ("conversation", TURNS, [ImageFile(PICTURE)])
    assert second.images == []


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    nested = pyarrow.array([[[PICTURE]], None], pyarrow.list_(pyarrow.list_(pyarrow.binary())))
    assert (
        records(write(tmp_path / "a.parquet", {"image": nested, "caption": ["x", "x"]}))
        == ["parquet_row"] * 2
    )
    columns = {"image": [5, 6], "caption": ["x", None]}
    assert records(write(tmp_path / "b.parquet", columns)) == ["parquet_row"] * 2
    numbers = {"image": [PICTURE] * 2, "caption": [1, 2]}
    assert records(write(tmp_path / "c.parquet", numbers)) == ["value_not_text"] * 2
    two = {"images": pyarrow.array([[PICTURE, PICTURE], []]), "caption": ["x", "y"]}
    assert records(write(tmp_path / "d.parquet", two)) == ["parquet_row"] * 2
    odd = {"kind": ["poem", "text"], "images": [[], []], "turns": [[], []], "meta": ["{", "[]"]}
    assert records(write(tmp_path / "e.parquet", odd)) == ["parquet_row", "not_an_object"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[: len(data) // 2], "is not a complete parquet file"),
        (lambda data: b"<html>" + data[6:-4] + b"html", "is not a complete parquet file"),
        (lambda data: b"", "is not a complete parquet file"),
        (
            lambda data: data[:20] + bytes(len(data[20:400])) + data[400:],
            r"a.parquet, row \d+: it cannot be read further",
        ),
    ],
)
def test_broken_files_are_named(tmp_path: Path, spoil: Any, message: str) -> None:
    path = write(tmp_path / "a.parquet", {"image": [PICTURE] * 20, "caption": ["A car."] * 20})
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        records(path)


def test_other_columns_are_refused_with_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.parquet has the columns url, key: .*rename its columns"):
        records(write(tmp_path / "a.parquet", {"url": ["x"], "key": ["y"]}))


@pytest.mark.parametrize("workers", [1, 2])
def test_to_a_dataset(make_config: MakeConfig, tmp_path: Path, workers: int) -> None:
    images = [PICTURE, b"<html>", PICTURE, None]
    columns = {"id": ["a", "b", "c", "d"], "image": images, "caption": ["One.", "Two.", "Three.", "Four."]}
    write(tmp_path / "0.parquet", columns)
    config = make_config([], input=str(tmp_path / "*.parquet"), image_root=None, workers=workers)
    info = run(config)
    assert (info.num_samples, info.skipped) == (2, {"image_format": 1, "parquet_row": 1})
    assert [(row["row"], row["id"]) for row in skipped_rows(config)] == [(2, "b"), (4, "d")]
    assert opened(config).image_bytes(1) == PICTURE


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_read_their_own_rows_of_a_group(tmp_path: Path, workers: int) -> None:
    captions = [f"caption {number}" for number in range(200)]
    path = write(tmp_path / "a.parquet", {"image": [PICTURE] * 200, "caption": captions}, row_group_size=70)
    rows = list(ParquetSource([path]).rows())
    sources = [ParquetSource([path]) for _ in range(workers)]
    found: list[str] = []
    for number, start in enumerate(range(0, 200, 16)):
        chunk = rows[start : start + 16]
        for _ in range(2):  # a row with a picture that cannot be stored is read again
            again = [sources[number % workers].record(row).turns[0]["value"] for row in chunk]
        found += again
    assert found == ["<image>" + caption for caption in captions]


READ = """
import resource, sys
from pathlib import Path
from megatron_eve.data.sources.parquet import ParquetSource
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = ParquetSource([Path(sys.argv[1])])
count = sum(len(source.record(row).images[0].data) for row in source.rows())
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_large_row_group_is_not_held_whole(tmp_path: Path) -> None:
    """One row group of 400 MB; a tenth of it is held."""
    data = bytes(1 << 20)
    path = write(
        tmp_path / "a.parquet", {"image": [data] * 400, "caption": ["x"] * 400},
        row_group_size=400, compression="none", use_dictionary=False,
    )  # fmt: skip
    command = [sys.executable, "-c", READ, str(path)]
    count, grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(count) == 400 << 20
    assert int(grown) < 150 * 1024  # KiB
