"""SA-1B: tar shards of photographs, whose masks are not read. There are no captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from megatron_eve.curation.preparing.preparer import Preparer
from megatron_eve.data.schema import Record
from megatron_eve.data.sources.source import RawRow, Source
from megatron_eve.data.sources.webdataset import WebdatasetSource


@dataclass
class Sa1b(Preparer):
    """A picture alone a row, its caption empty; `meta` has image_id, width, height and file_name.

    The 1,000 archives of the download have about 11,000 pictures each (github.com/facebookresearch/segment-anything).
    """

    name: ClassVar[str] = "sa1b"
    what: ClassVar[str] = "SA-1B, photographs without captions"
    layout: ClassVar[str] = "the archives sa_000000.tar ... with sa_<id>.jpg and sa_<id>.json in them"
    license: ClassVar[str] = "SA-1B Research License"

    def files(self) -> list[Path]:
        """The archives."""
        return self.find("**/sa_*.tar")

    def open(self, files: Sequence[Path]) -> Source:
        """A reader of the archives."""
        return _Sa1bSource(files)


class _Sa1bSource(WebdatasetSource):
    def _make_record(self, row: RawRow) -> Record:
        record = super()._make_record(row)
        # The key of a member is its path in the archive, which some copies pack in a folder.
        return replace(record, id=Path(str(record.id)).name, source=Sa1b.name)
