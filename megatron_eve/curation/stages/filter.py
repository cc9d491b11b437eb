"""The stage `filter`: looks at every row, drops those that break a rule, and hashes the pictures of the others."""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow

from megatron_eve.curation.stage import Stage
from megatron_eve.curation.stage_record import StageRecord
from megatron_eve.curation.work import Work
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.images.decode import DEFAULT_MAX_PIXELS, decode_image
from megatron_eve.data.schema import Record
from megatron_eve.runtime.command_line import whole_number

SCHEMA = pyarrow.schema(
    [
        ("row", pyarrow.int64()),
        ("id", pyarrow.string()),
        ("reason", pyarrow.string()),
        ("detail", pyarrow.string()),
        ("width", pyarrow.int32()),
        ("height", pyarrow.int32()),
        ("sha256", pyarrow.binary(32)),
        ("phash", pyarrow.uint64()),
    ]
)
"""Columns of the table: `reason` is null for a row that is kept; the others are null where they are not known."""


@dataclass(frozen=True)
class FilterStage(Stage):
    """Drops rows by rules.

    Attributes:
        min_side: least width and height of a picture, in pixels.
    """

    name: ClassVar[str] = "filter"
    needs: ClassVar[tuple[str, ...]] = ()

    min_side: int

    def run(self, work: Work, shard: int) -> Counter[str]:
        """See `Stage`: the counts are those of rows by reason, and of rows that are kept."""
        rows = [self._look_at(number, record) for number, record in work.records(shard)]
        work.write_table(self.name, shard, pyarrow.Table.from_pylist(rows, SCHEMA))
        return Counter(row.get("reason") or "kept" for row in rows)

    def _look_at(self, number: int, record: Record | SkipRow) -> dict[str, Any]:
        """One row of the table."""
        found: dict[str, Any] = {"row": number, "id": record.id}
        try:
            if isinstance(record, SkipRow):
                raise record
            self._check(record, found)
        except SkipRow as skip:
            found |= {"reason": skip.reason, "detail": skip.detail}
        return found

    def _check(self, record: Record, found: dict[str, Any]) -> None:
        import imagehash  # takes long to import

        for image in record.images:
            picture = decode_image(image.data or b"", apply_exif=True, max_pixels=DEFAULT_MAX_PIXELS)
            if len(record.images) == 1:
                found["width"], found["height"] = picture.size
                found["sha256"] = hashlib.sha256(image.data or b"").digest()
                found["phash"] = int(str(imagehash.phash(picture)), 16)
            if min(picture.size) < self.min_side:
                raise SkipRow("too_small", f"{picture.width} x {picture.height} pixels")

    def report(self, work: Work) -> list[tuple[str, str]]:
        """See `Stage`."""
        record = StageRecord.read(work, self.name)
        assert record is not None
        return [(label, f"{count:,}") for label, count in record.counts(work).most_common()]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this stage."""
    parser.add_argument(
        "--input",
        nargs="+",
        metavar="FILE",
        help="parquet shards of records, or patterns in quotation marks, whose files are sorted by name; needed "
        "the first time, later the shards are those of WORK/inputs.json",
    )
    parser.add_argument(
        "--min-side",
        type=whole_number(0),
        default=449,
        metavar="N",
        help="drop rows with a picture whose width or height is less than N pixels (published: both above 448)",
    )


def from_flags(flags: argparse.Namespace) -> FilterStage:
    """The stage with the settings of the command line."""
    return FilterStage(min_side=flags.min_side)
