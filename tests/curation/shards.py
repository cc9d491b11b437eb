"""Parquet shards of records for the tests of curation, and stages that do what a test asks for."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow
from PIL import Image

from megatron_eve.curation.stage import Stage
from megatron_eve.curation.work import Work
from megatron_eve.data.errors import DataError
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.parquet import write_records


def photo(width: int, height: int, seed: int) -> Image.Image:
    """A smooth picture of random colours, unlike that of another seed."""
    colours = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """The file of a picture."""
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def pair(name: str, image: Image.Image | bytes, caption: str, **meta: object) -> Record:
    """A picture and its caption."""
    data = image if isinstance(image, bytes) else jpeg(image)
    turns = [{"from": "gpt", "value": f"<image>{caption}"}]
    return Record(name, "test", "pair", [ImageFile(data, f"{name}.jpg")], turns, meta)


def write_shards(folder: Path, shards: Sequence[Sequence[Record]]) -> str:
    """Write shards; returns the pattern that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, records in enumerate(shards):
        write_records(folder / f"{number:03d}.parquet", records)
    return str(folder / "*.parquet")


def numbered_shards(folder: Path, shards: int = 4, rows: int = 3, side: int = 64) -> str:
    """Shards of pairs whose names and captions say where they stand."""
    return write_shards(
        folder,
        [
            [
                pair(
                    f"{shard}-{row}",
                    photo(side, side, 100 * shard + row),
                    f"Picture {row} of shard {shard}.",
                    row=row,
                )
                for row in range(rows)
            ]
            for shard in range(shards)
        ],
    )


@dataclasses.dataclass(frozen=True)
class RowsStage(Stage):
    """Writes the numbers of the rows; it fails in ways that files beside the work folder ask for.

    A file WORK.FAULT.SHARD has the fault: "kill", "bug", "mistake" or "hang".
    """

    name: ClassVar[str] = "filter"
    needs: ClassVar[tuple[str, ...]] = ()

    factor: int = 1

    def run(self, work: Work, shard: int) -> Counter[str]:
        with work.output(self.name, shard) as path:
            path.write_bytes(b"half a table")
            self._fail(work, shard)
        rows = [
            {"row": row, "reason": None, "value": self.factor * row} for row in range(work.inputs.rows[shard])
        ]
        schema = pyarrow.schema(
            [("row", pyarrow.int64()), ("reason", pyarrow.string()), ("value", pyarrow.int64())]
        )
        work.write_table(self.name, shard, pyarrow.Table.from_pylist(rows, schema))
        return Counter({"rows": len(rows)})

    def _fail(self, work: Work, shard: int) -> None:
        there = [
            fault
            for fault in ("kill", "bug", "mistake", "hang")
            if fault_file(work.folder, fault, shard).exists()
        ]
        print("a line that goes to the file of this task")
        match there:
            case ["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["bug"]:
                raise ZeroDivisionError("a bug")
            case ["mistake"]:
                raise DataError("the disk has a scratch: polish it")
            case ["hang"]:
                fault_file(work.folder, "hangs", shard).write_text(str(os.getpid()))
                time.sleep(600)

    def report(self, work: Work) -> list[tuple[str, str]]:
        from megatron_eve.curation.stage_record import StageRecord

        record = StageRecord.read(work, self.name)
        assert record is not None
        return [("rows", str(record.counts(work)["rows"]))]


@dataclasses.dataclass(frozen=True)
class TogetherStage(RowsStage):
    """One task for all shards, after RowsStage."""

    name: ClassVar[str] = "duplicates"
    per_shard: ClassVar[bool] = False
    files: ClassVar[tuple[str, ...]] = ("all.txt",)
    needs: ClassVar[tuple[str, ...]] = ("filter",)

    def run(self, work: Work, shard: int) -> Counter[str]:
        for number in range(len(work.inputs)):
            rows = work.kept_rows(number, self.name)
            reasons = ["duplicate_exact" if row == 1 else None for row in rows.tolist()]
            work.write_table(self.name, number, pyarrow.table({"row": rows, "reason": reasons}))
        with work.output_file(self.name, "all.txt") as path:
            path.write_text("all")
        return Counter({"rows": len(work.inputs)})


def fault_file(folder: Path, fault: str, shard: int) -> Path:
    """The file that asks for a fault."""
    return folder.with_name(f"{folder.name}.{fault}.{shard}")
