"""The stage `duplicates`: drops rows whose picture is a copy of an earlier one, over all shards at once."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from megatron_eve.curation.duplicates import COLUMNS, EXACT, NEAR, dropped_tables, find_copies, gather
from megatron_eve.curation.near_duplicates import MAX_DISTANCE
from megatron_eve.curation.stage import Stage
from megatron_eve.curation.stage_record import StageRecord
from megatron_eve.curation.work import Work
from megatron_eve.runtime.command_line import whole_number


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
        """See `Stage`: the one task reads the tables of all shards and writes one for each."""
        tables = (work.read_table("filter", number, COLUMNS) for number in range(len(work.inputs)))
        rows = gather(tables, sum(work.inputs.rows))
        copies = find_copies(rows, self.distance)
        counts = Counter(compared=len(rows.row), plain=copies.num_plain)
        for number, table in enumerate(dropped_tables(rows, copies)):
            work.write_table(self.name, number, table)
            counts.update(table["reason"].to_pylist())
            counts.update(f"distance {bits}" for bits in table["distance"].to_pylist())
        return counts
