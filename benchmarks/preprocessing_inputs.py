"""Synthetic inputs in all layouts of preprocessing, for benchmarks/preprocessing.py. Not a benchmark.

All rows use the same few images, so the benchmark measures decoding and copying, not the disk.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from gpu_common import photos
from pyarrow import parquet

from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.parquet import write_records

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "quickstart"))

DISTINCT = 8  # number of different images
_CAPTION = 600  # characters
_LICENSE = "https://creativecommons.org/licenses/by/2.0/"
_WORDS = (
    "a man", "the old woman", "a small child", "two dogs", "the red car", "a wooden boat", "the empty street",
    "a river", "mountains", "the window", "a table", "chairs", "the bridge", "a tree", "white flowers", "stone",
    "bright light", "shadow", "stands", "sits", "walks", "runs", "looks", "holds", "carries", "behind", "before",
    "between", "along", "across", "in the morning", "at night", "of", "and", "with", "near", "under", "broken",
    "quiet", "crowded", "green",
)  # fmt: skip


@dataclass(frozen=True)
class Input:
    """One input of preprocessing.

    Attributes:
        name: for the table.
        settings: fields of PreprocessConfig for this input.
        rows: number of rows.
        num_bytes: bytes of texts and images that one pass reads.
        kept: whether its rows become samples.
    """

    name: str
    settings: dict[str, Any]
    rows: int
    num_bytes: int
    kept: bool = True


def captions(count: int) -> list[str]:
    """Random texts of about 600 characters; deterministic."""
    drawn = random.Random(0)
    return [" ".join(drawn.choices(_WORDS, k=_CAPTION // 4))[:_CAPTION] for _ in range(count)]


def tokenizer(folder: Path) -> str:
    """The quickstart's tokenizer of 512 pieces, trained on such texts."""
    from tokenizer import train

    return str(train(captions(50), folder / "tokenizer.model"))


class Maker:
    """Writes inputs into a folder.

    Args:
        folder: target folder.
        pictures: bytes of different JPEG files.
    """

    def __init__(self, folder: Path, pictures: Sequence[bytes]) -> None:
        self._folder, self._pictures = folder, pictures
        self._texts = captions(50)
        self._photos = folder / "photos"
        self._photos.mkdir(parents=True)
        for number, data in enumerate(pictures):
            (self._photos / f"{number}.jpg").write_bytes(data)

    def llava(self, rows: int, suffix: str) -> Input:
        """Rows in the LLaVA layout with one image each, as an array (.json) or lines (.jsonl)."""
        lines = [
            json.dumps({
                "id": str(number), "image": f"{number % len(self._pictures)}.jpg",
                "conversations": [
                    {"from": "human", "value": "<image>\nDescribe the picture."},
                    {"from": "gpt", "value": self._text(number)},
                ],
            })
            for number in range(rows)
        ]  # fmt: skip
        text = "[" + ",\n".join(lines) + "]" if suffix == ".json" else "\n".join(lines) + "\n"
        return self.named(f"llava {suffix}", self._write(f"llava{suffix}", text), rows, rows)

    def webdataset(self, rows: int) -> Input:
        """A tar shard as img2dataset writes it."""
        path = self._folder / "pairs.tar"
        with tarfile.open(path, "w") as archive:
            for number in range(rows):
                key, text = f"{number:09}", self._text(number)
                metadata = {
                    "url": f"https://example.com/{key}.jpg", "caption": text, "key": key, "status": "success",
                    "error_message": None, "width": 640, "height": 480, "original_width": 1280, "exif": "{}",
                    "sha256": "ab" * 32, "similarity": 0.31, "LICENSE": _LICENSE,
                }  # fmt: skip
                for suffix, data in (
                    ("jpg", self._picture(number)), ("txt", text.encode()), ("json", json.dumps(metadata).encode())
                ):  # fmt: skip
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        return Input("webdataset", {"input": path}, rows, path.stat().st_size)

    def parquet_hub(self, rows: int, group_rows: int = 100) -> Input:
        """A data set of the Hugging Face hub: `image` as bytes and path, `caption`, and two more columns."""
        path = self._folder / "hub.parquet"
        image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        text, number = pyarrow.string(), pyarrow.float64()
        columns = [("image", image), ("caption", text), ("score", number), ("license", text)]
        schema = pyarrow.schema(columns)
        with parquet.ParquetWriter(path, schema, write_batch_size=group_rows) as writer:
            for start in range(0, rows, group_rows):
                group = [
                    {
                        "image": {"bytes": self._picture(number), "path": f"{number}.jpg"},
                        "caption": self._text(number), "score": 0.31, "license": _LICENSE,
                    }
                    for number in range(start, min(start + group_rows, rows))
                ]  # fmt: skip
                writer.write_table(pyarrow.Table.from_pylist(group, schema))
        return Input("parquet, hub", {"input": path}, rows, path.stat().st_size)

    def parquet_records(self, rows: int) -> Input:
        """A shard of records, as stages of the data engine exchange them."""
        path = self._folder / "records.parquet"
        write_records(path, self._records(rows))
        return Input("parquet, records", {"input": path}, rows, path.stat().st_size)

    def mmc4(self, rows: int) -> Input:
        """Documents of six sentences with two pictures each."""
        lines = []
        for number in range(rows):
            text = self._text(number)
            info = [
                {
                    "image_name": f"{(number + place) % len(self._pictures)}.jpg", "matched_text_index": place,
                    "raw_url": f"https://example.com/{number}/{place}.jpg", "matched_sim": 0.3, "face_detections": None,
                }
                for place in (0, 3)
            ]  # fmt: skip
            sentences = [text[start : start + 100] for start in range(0, 600, 100)]
            matrix = [[0.2] * len(sentences)] * len(info)
            lines.append(json.dumps({
                "text_list": sentences, "url": f"https://example.com/{number}", "could_have_url_duplicate": 0,
                "similarity_matrix": matrix, "image_info": info,
            }))  # fmt: skip
        path = self._write("docs_shard_0_v3.jsonl", "\n".join(lines) + "\n")
        return self.named("mmc4, 2 pictures", path, rows, 2 * rows, template="document")

    def text(self, rows: int) -> Input:
        """Lines of text."""
        lines = [json.dumps({"text": self._text(number)}) for number in range(rows)]
        path = self._write("text.jsonl", "\n".join(lines) + "\n")
        return Input("text", {"input": path, "template": "document"}, rows, path.stat().st_size)

    def open_images(self, rows: int) -> Input:
        """The CSV of OpenImages and its images, which are hard links. There are no captions, so no row is kept."""
        names = (
            "ImageID", "Subset", "OriginalURL", "OriginalLandingURL", "License", "AuthorProfileURL", "Author", "Title",
            "OriginalSize", "OriginalMD5", "Thumbnail300KURL", "Rotation",
        )  # fmt: skip
        path, folder = self._folder / "train-images.csv", self._folder / "V6Train1"
        folder.mkdir()
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            for number in range(rows):
                name = f"{number:016x}"
                os.link(self._photos / f"{number % len(self._pictures)}.jpg", folder / f"{name}.jpg")
                url = f"https://example.com/{name}.jpg"
                writer.writerow(
                    [
                        name,
                        "train",
                        url,
                        url,
                        _LICENSE,
                        url,
                        "Ann, B.",
                        "a title",
                        80_000,
                        "q" * 24,
                        url,
                        "0.0",
                    ]
                )
        settings = {"input": path, "image_root": folder}
        return Input("open_images", settings, rows, path.stat().st_size, kept=False)

    def _records(self, rows: int) -> Iterator[Record]:
        for number in range(rows):
            turns = [{"from": "gpt", "value": "<image>" + self._text(number)}]
            picture = ImageFile(self._picture(number), f"{number}.jpg")
            yield Record(str(number), "benchmark", "pair", [picture], turns, {"license": _LICENSE})

    def named(self, name: str, path: Path, rows: int, pictures: int, **settings: Any) -> Input:
        """An input whose rows name picture files."""
        size = path.stat().st_size
        size += sum(len(self._pictures[number % len(self._pictures)]) for number in range(pictures))
        return Input(name, {"input": path, "image_root": self._photos, **settings}, rows, size)

    def _write(self, name: str, text: str) -> Path:
        path = self._folder / name
        path.write_text(text)
        return path

    def _picture(self, number: int) -> bytes:
        """A JPEG file that differs in each row (its number is in a comment), since parquet stores equal values once."""
        data = self._pictures[number % len(self._pictures)]
        return data[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big") + data[2:]

    def _text(self, number: int) -> str:
        return self._texts[number % len(self._texts)]


def all_sources(folder: Path, rows: int, rows_of_text: int) -> list[Input]:
    """One input of each layout; pictures of 640x480, about 80 kB. The last two decode no images."""
    make = Maker(folder, photos(DISTINCT, 640, 480))
    return [
        make.llava(rows, ".json"), make.llava(rows, ".jsonl"), make.webdataset(rows), make.parquet_hub(rows),
        make.parquet_records(rows), make.mmc4(rows // 2), make.text(rows_of_text), make.open_images(rows_of_text),
    ]  # fmt: skip


def large_photos(folder: Path, rows: int, width: int, height: int) -> Input:
    """Rows in the LLaVA layout with large photos."""
    return Maker(folder, photos(DISTINCT, width, height)).llava(rows, ".json")
