"""The stage `duplicates`: drops rows whose picture is a copy of an earlier one, over all shards at once.

Of two copies the first is kept, in the order in which the shards were given to `filter`. Exact copies are files of the
same SHA-256; near copies have perceptual hashes that differ in few bits: pictures encoded again, shrunk, or cropped a
little. Only rows with one picture are compared, and their texts are not looked at.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from megatron_eve.curation.duplicates import COLUMNS, EXACT, NEAR, dropped_tables, find_copies, gather
from megatron_eve.curation.duplicates_page import write_duplicates_page
from megatron_eve.curation.near_duplicates import MAX_DISTANCE
from megatron_eve.curation.reasons import find_reason
from megatron_eve.curation.stage import Stage
from megatron_eve.curation.stage_record import StageRecord
from megatron_eve.curation.work import Work

DISTANCE = 6
"""Default: finds 95 % of the pictures that lost 1 % at each side."""
_COMPARED, _PLAIN, _BITS = "compared", "plain", "bits_"


@dataclass(frozen=True)
class DuplicatesStage(Stage):
    """Drops exact and near copies.

    Attributes:
        distance: most bits in which the perceptual hashes of near copies differ; None to drop exact copies only.
    """

    name: ClassVar[str] = "duplicates"
    per_shard: ClassVar[bool] = False

    distance: int | None

    def run(self, work: Work, shard: int) -> Counter[str]:
        """See `Stage`: the counts are those of rows compared, dropped by reason, and near copies by distance."""
        tables = (work.read_table("filter", number, COLUMNS) for number in range(len(work.inputs)))
        rows = gather(tables, sum(work.inputs.rows))
        copies = find_copies(rows, self.distance)
        counts = Counter({_COMPARED: len(rows.row), _PLAIN: copies.num_plain, EXACT: 0, NEAR: 0})
        for number, table in enumerate(dropped_tables(rows, copies)):
            work.write_table(self.name, number, table)
            reasons = table["reason"].to_pylist()
            counts.update(reasons)
            bits = zip(reasons, table["distance"].to_pylist(), strict=True)
            counts.update(f"{_BITS}{distance}" for reason, distance in bits if reason == NEAR)
        return counts

    def report(self, work: Work) -> list[tuple[str, str]]:
        """See `Stage`: rows by reason, and the page of pairs."""
        record = StageRecord.read(work, self.name)
        assert record is not None
        counts = record.counts(work)
        compared = counts[_COMPARED]
        kept = compared - counts[EXACT] - counts[NEAR]
        rows = [
            ("rows compared", f"{compared:,}, those with one picture"),
            ("rows kept", f"{kept:,}" + (f" ({kept / compared:.1%})" if compared else "")),
        ]
        rows += [
            ("dropped", f"{counts[name]:>8,}  {name}: {find_reason(name).what}") for name in (EXACT, NEAR)
        ]
        by_bits = [
            f"{counts[f'{_BITS}{bits}']:,} at {bits}"
            for bits in range(MAX_DISTANCE + 1)
            if counts[f"{_BITS}{bits}"]
        ]
        if by_bits:
            rows.append(("near, by bits", ", ".join(by_bits)))
        if counts[_PLAIN]:
            rows.append(
                (
                    "too plain",
                    f"{counts[_PLAIN]:,} pictures of one colour or stripes, only compared as files",
                )
            )
        if counts[EXACT] or counts[NEAR]:
            rows.append(("to look at them", str(write_duplicates_page(work))))
        return rows


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this stage."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--distance",
        type=int,
        choices=range(MAX_DISTANCE + 1),
        default=DISTANCE,
        help="drop rows whose perceptual hash differs from that of an earlier row in at most so many of 64 bits; "
        "fewer for drawings and pages of text, which are more alike than photos",
    )
    group.add_argument(
        "--exact-only",
        action="store_true",
        help="drop only rows whose picture is the same file, byte by byte",
    )


def from_flags(flags: argparse.Namespace) -> DuplicatesStage:
    """The stage with the settings of the command line."""
    return DuplicatesStage(None if flags.exact_only else flags.distance)
