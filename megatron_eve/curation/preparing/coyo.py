"""COYO-700M: pictures of the web with their texts, downloaded by img2dataset, joined with the published metadata."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from megatron_eve.curation.preparing.coyo_metadata import CoyoIndex, CoyoRows, CoyoSelection
from megatron_eve.curation.preparing.img2dataset import LAYOUT, Img2datasetPreparer, Img2datasetSource
from megatron_eve.curation.preparing.reasons import NOT_IN_METADATA, NOT_SELECTED
from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.schema import Record
from megatron_eve.data.sources.source import RawRow, Source

# Of the metadata; img2dataset says what the stored picture has, and has the other two itself.
_NOT_JOINED = frozenset({"id", "url", "text", "width", "height"})


@dataclass
class Coyo(Img2datasetPreparer):
    """A pair a row; `meta` has the keys of its JSON and, where metadata files are there, their scores.

    A row is found in the metadata by the `id` of its JSON, which img2dataset keeps with
    `--save_additional_columns '["id"]'`, otherwise by its URL and text. VILA's selection
    (github.com/NVlabs/VILA, data_prepare/coyo) is `--min-clip-similarity 0.6 --best-share 0.2`.

    Attributes:
        min_clip_similarity, best_share: see `CoyoSelection`.
    """

    name: ClassVar[str] = "coyo"
    what: ClassVar[str] = "COYO-700M, pictures with captions"
    layout: ClassVar[str] = f"{LAYOUT}; and, for scores, the metadata part-00000-...-c000.snappy.parquet ..."

    min_clip_similarity: float | None = None
    best_share: float | None = None

    @classmethod
    def add_flags(cls, group: argparse._ArgumentGroup) -> None:
        """The selection."""
        group.add_argument(
            "--min-clip-similarity",
            type=_number(-2.0, 2.0),
            metavar="X",
            help="keep rows of which clip_similarity_vitb32 + clip_similarity_vitl14 is larger than X; VILA took 0.6 "
            "(default: no limit)",
        )
        group.add_argument(
            "--best-share",
            type=_number(0.0, 1.0),
            metavar="X",
            help="of the rows of each metadata file, keep this share, those with the largest sums; VILA took 0.2 "
            "(default: all)",
        )

    def open(self, files: Sequence[Path]) -> Source:
        """A reader of the archives, joined with the metadata if it is there."""
        metadata = sorted(self.folder.glob("**/part-*.parquet"))
        selection = CoyoSelection(self.min_clip_similarity, self.best_share)
        if selection != CoyoSelection() and not metadata:
            raise DataError(
                f"--source {self.folder} has no part-*.parquet: --min-clip-similarity and --best-share read the "
                "similarities of COYO's metadata; put its files there"
            )
        return _CoyoSource(files, self.folder, metadata, selection)

    def settings(self) -> dict[str, Any]:
        """With the metadata files by name and size."""
        metadata = sorted(self.folder.glob("**/part-*.parquet"))
        return {
            **super().settings(),
            "metadata files": [[file.name, file.stat().st_size] for file in metadata],
        }


class _CoyoSource(Img2datasetSource):
    def __init__(
        self, files: Sequence[Path], folder: Path, metadata: Sequence[Path], selection: CoyoSelection
    ) -> None:
        super().__init__(files, folder, Coyo.name)
        self._parts = metadata
        self._selection = selection
        self._joined = CoyoRows(metadata)

    def rows(self) -> Iterator[RawRow]:
        """Rows with their places in the metadata, which are looked up in the parent so that it alone has the index."""
        if not self._parts:
            yield from (row._replace(payload=(row.payload, None)) for row in super().rows())
            return
        selects = self._selection != CoyoSelection()
        index: CoyoIndex | None = None
        for row in super().rows():
            fields = self._fields(row)
            if fields is None:  # a worker says what is wrong with it
                yield row._replace(payload=(row.payload, None))
                continue
            index = index or CoyoIndex(self._parts, self._selection, by_id="id" in fields)
            place, problem = index.find(fields), None
            if place is None and selects:
                problem = NOT_SELECTED, "the metadata does not have it among the selected rows"
            elif place is None:
                problem = NOT_IN_METADATA, f"no row of {len(self._parts)} files"
            yield row._replace(payload=(row.payload, place), problem=row.problem or problem)

    def _fields(self, row: RawRow) -> dict[str, Any] | None:
        """The JSON beside a picture; None without one that can be read."""
        found = [member for member in row.payload if member[0].lower().endswith(".json")]
        try:
            return self._metadata(row.file, found[0][:3]) if found else None
        except SkipRow:
            return None

    def _make_record(self, row: RawRow) -> Record:
        members, place = row.payload
        record = super()._make_record(row._replace(payload=members))
        fields = self._joined.row(place) if place is not None else {}
        if self._parts and fields.get("url") != record.meta.get("url"):
            skip = SkipRow(
                NOT_IN_METADATA, "the metadata has another URL for its id" if fields else "it has no JSON"
            )
            skip.id = record.id
            raise skip
        meta = {key: value for key, value in record.meta.items() if key != "id"}
        meta |= {key: value for key, value in fields.items() if key not in _NOT_JOINED and value is not None}
        name = fields.get("id", record.meta.get("id"))
        return replace(record, id=record.id if name is None else str(name), meta=meta)


def _number(least: float, most: float) -> Callable[[str], float]:
    """The `type` of a flag that takes numbers in a range."""

    def read(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word}: must be a number") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{word}: must lie between {least:g} and {most:g}")
        return value

    return read
