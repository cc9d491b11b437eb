"""The stage `build`: writes the curated shards, with the rows that all stages before it have left.

They are parquet shards of records, as tools/preprocess_data.py reads them. A row with a new caption has it in its turn,
and the old one in its metadata (original_caption).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

from pyarrow import compute

from megatron_eve.curation.captions_of_records import with_caption
from megatron_eve.curation.stage import Stage
from megatron_eve.curation.stage_record import StageRecord
from megatron_eve.curation.work import Work
from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.schema import Record
from megatron_eve.data.sources.parquet import write_records


@dataclass(frozen=True)
class BuildStage(Stage):
    """Writes the curated shards; it has no settings."""

    name: ClassVar[str] = "build"

    def run(self, work: Work, shard: int) -> Counter[str]:
        """See `Stage`: counts rows that were read and written, and new captions."""
        captions = self._captions(work, shard)
        records = self._records(work, shard, captions)
        first = next(records, None)
        if first is None:  # preprocessing refuses a file without rows
            work.write_empty(self.name, shard)
            return Counter({"read": work.inputs.rows[shard], "empty shards": 1})
        with work.output(self.name, shard) as path:
            count = write_records(path, chain([first], records))
        return Counter({"read": work.inputs.rows[shard], "written": count, "captions": len(captions)})

    def _captions(self, work: Work, shard: int) -> dict[int, str]:
        """The new captions of a shard, by row; rows that keep their text have none."""
        if not work.has("caption"):
            return {}
        table = work.read_table("caption", shard, ("row", "caption", "reason"))
        table = table.filter(compute.and_(table["reason"].is_null(), table["caption"].is_valid()))
        return dict(zip(table["row"].to_pylist(), table["caption"].to_pylist(), strict=True))

    def _records(self, work: Work, shard: int, captions: dict[int, str]) -> Iterator[Record]:
        """The rows that are written."""
        for row, record in work.records(shard, work.kept_rows(shard, self.name)):
            if isinstance(record, SkipRow):
                raise DataError(
                    f"{work.inputs.files[shard]}, row {row}: the stage filter could read it, and now it cannot be read "
                    f"({record}): begin anew in another --work"
                )
            yield with_caption(record, captions[row]) if row in captions else record

    def report(self, work: Work) -> list[tuple[str, str]]:
        """See `Stage`."""
        record = StageRecord.read(work, self.name)
        assert record is not None
        counts = record.counts(work)
        folder = work.stage_folder(self.name)
        return [
            ("rows read", f"{counts['read']:,}"),
            ("rows written", f"{counts['written']:,}, of which {counts['captions']:,} have a new caption"),
            ("curated shards", f"{folder}; {counts['empty shards']:,} shards have no row left and no file"),
            ("next", f"python tools/preprocess_data.py --input '{folder}/*.parquet' ..."),
        ]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """This stage has no flags of its own."""


def from_flags(flags: argparse.Namespace) -> BuildStage:
    """The stage."""
    return BuildStage()
