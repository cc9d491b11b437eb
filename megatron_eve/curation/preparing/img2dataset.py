"""Downloads of img2dataset (github.com/rom1504/img2dataset) as webdataset shards, with its statistics beside them.

Beside `00000.tar` are `00000.parquet`, whose rows are all that it tried to download, and `00000_stats.json` with
{count, successes, failed_to_download, failed_to_resize, ...}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_eve.curation.preparing.preparer import Preparer
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import Record
from megatron_eve.data.sources.fields import parse_object
from megatron_eve.data.sources.source import RawRow
from megatron_eve.data.sources.webdataset import WebdatasetSource

LAYOUT = (
    "the shards of img2dataset (--output_format webdataset): 00000.tar, 00000.parquet, 00000_stats.json ..."
)
"""What a preparer of such a download expects."""


class Img2datasetPreparer(Preparer):
    """Base class of preparers of such downloads; each row is a pair of a picture and its caption."""

    def files(self) -> list[Path]:
        """The archives."""
        return self.find("**/*.tar")

    def dead_links(self) -> int:
        """Rows that img2dataset could not download or resize, by its statistics."""
        total = 0
        for file in self.folder.glob("**/*_stats.json"):
            try:
                counts = parse_object(file.read_bytes())
            except SkipRow:  # of a shard that img2dataset did not finish
                continue
            total += sum(
                value
                for name in ("failed_to_download", "failed_to_resize")
                if isinstance(value := counts.get(name), int)
            )
        return total


class Img2datasetSource(WebdatasetSource):
    """Rows of the archives, with the id that the row has in its data set.

    Args:
        files: the archives.
        folder: of the download. An archive in a folder below it puts that folder in front of the id, since img2dataset
            begins to count in each of its output folders.
        name: `source` of the records.
    """

    def __init__(self, files: Sequence[Path], folder: Path, name: str) -> None:
        super().__init__(files)
        self._folder = folder
        self._name = name

    def _make_record(self, row: RawRow) -> Record:
        record = super()._make_record(row)
        place = Path(row.file).parent.relative_to(self._folder)
        return replace(record, id=str(place / str(record.id)), source=self._name)
