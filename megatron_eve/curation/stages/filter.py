"""The stage `filter`: looks at every row, drops those that break a rule, and hashes the pictures of the others.

Rows that cannot be read, or have a picture that does not decode, are dropped whatever they are. The other rules are for
pairs of a picture and a caption: conversations, documents and texts are kept. A pair without a caption breaks no rule
for captions, since it gets one later.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow
from PIL import Image

from megatron_eve.curation.captions_of_records import caption_of
from megatron_eve.curation.dropped_page import write_dropped_page
from megatron_eve.curation.hashes import perceptual_hash, sha256_of
from megatron_eve.curation.reasons import find_reason
from megatron_eve.curation.rules import PUBLISHED_MIN_SIDE, PictureRules
from megatron_eve.curation.stage import Stage
from megatron_eve.curation.stage_record import StageRecord
from megatron_eve.curation.text_rules import CaptionRules, add_caption_flags, caption_rules
from megatron_eve.curation.work import Work
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.images.decode import DEFAULT_MAX_PIXELS, decode_image
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.text.turns import checked_turns
from megatron_eve.runtime.command_line import whole_number

KEPT = "kept"
"""Label of the rows that are kept, among the counts by reason."""

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
"""Columns of the table, a row for each row of the shard.

- `reason`: null for a row that is kept; `detail` says what was found.
- `width`, `height`: of the picture, decoded and upright, in pixels.
- `sha256`: of the file of the picture.
- `phash`: imagehash's perceptual hash of 8 x 8 bits, of rows that are kept.

The last four are null for rows that have not exactly one picture, or none that decodes.
"""


@dataclass(frozen=True)
class FilterStage(Stage):
    """Drops rows by rules.

    Attributes:
        pictures, captions: the rules.
    """

    name: ClassVar[str] = "filter"
    needs: ClassVar[tuple[str, ...]] = ()

    pictures: PictureRules
    captions: CaptionRules

    def settings(self) -> dict[str, Any]:
        """See `Stage`."""
        return {**vars(self.pictures), **vars(self.captions)}

    def run(self, work: Work, shard: int) -> Counter[str]:
        """See `Stage`: the counts are those of rows by reason, and of rows that are kept."""
        rows = [self._look_at(number, record) for number, record in work.records(shard)]
        work.write_table(self.name, shard, pyarrow.Table.from_pylist(rows, SCHEMA))
        return Counter(row.get("reason") or KEPT for row in rows)

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
        """Check a row and write what is found of its picture; raises SkipRow if it is dropped."""
        checked_turns(record.turns)
        caption = caption_of(record)
        picture = None
        for image in record.images:
            picture = _decode(image)
            if len(record.images) == 1:
                digest = sha256_of(image.data or b"")
                found |= {"width": picture.width, "height": picture.height, "sha256": digest}
            if caption is not None:
                self.pictures.check(picture)
        if caption:
            self.captions.check(caption)
        if picture is not None and len(record.images) == 1:
            found["phash"] = perceptual_hash(picture)

    def report(self, work: Work) -> list[tuple[str, str]]:
        """See `Stage`: rows by reason, and the page of dropped rows."""
        record = StageRecord.read(work, self.name)
        assert record is not None
        counts = record.counts(work)
        total, kept = counts.total(), counts.pop(KEPT, 0)
        rows = [
            ("rows read", f"{total:,}"),
            ("rows kept", f"{kept:,}" + (f" ({kept / total:.1%})" if total else "")),
        ]
        rows += [
            ("dropped", f"{count:>8,}  {name}: {find_reason(name).what}")
            for name, count in counts.most_common()
        ]
        if counts:
            rows.append(("to look at them", str(write_dropped_page(work, counts, total))))
        return rows


def _decode(image: ImageFile) -> Image.Image:
    """The picture of a row; raises SkipRow."""
    if image.data is None:
        raise SkipRow("picture_not_in_shard", image.path or "")
    return decode_image(image.data, apply_exif=True, max_pixels=DEFAULT_MAX_PIXELS)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this stage."""
    parser.add_argument(
        "--input",
        nargs="+",
        metavar="FILE",
        help="parquet shards of records, or patterns in quotation marks, whose files are sorted by name; needed the "
        "first time, later the shards are those of WORK/inputs.json; of duplicates the first in this order is kept",
    )
    group = parser.add_argument_group(
        "rules for pictures", "Of pairs of a picture and a caption, or no caption yet."
    )
    group.add_argument(
        "--min-side",
        type=whole_number(0),
        default=PUBLISHED_MIN_SIDE,
        metavar="N",
        help="drop pictures of less than N pixels in width or height; the published rule is more than 448",
    )
    group.add_argument(
        "--max-aspect",
        type=_ratio,
        metavar="X",
        help="drop pictures whose longer side is more than X times the shorter one (default: any is kept)",
    )
    add_caption_flags(
        parser,
        CaptionRules(),
        "Of captions that the rows have. All are off by default: where the stage caption writes captions anew, it has "
        "these rules for the new ones.",
    )


def from_flags(flags: argparse.Namespace) -> FilterStage:
    """The stage with the settings of the command line."""
    return FilterStage(PictureRules(flags.min_side, flags.max_aspect), caption_rules(flags))


def _ratio(word: str) -> float:
    """The `type` of --max-aspect."""
    try:
        value = float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word}: must be a number") from None
    if not value >= 1:
        raise argparse.ArgumentTypeError(f"{word}: must be 1 or more")
    return value
