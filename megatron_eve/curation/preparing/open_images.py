"""OpenImages: photographs in folders, and a CSV with the origin and the license of each. There are no captions."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from megatron_eve.curation.preparing.preparer import Preparer
from megatron_eve.curation.preparing.reasons import EVAL_SPLIT
from megatron_eve.curation.preparing.splits import is_eval_split
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import Record
from megatron_eve.data.sources.open_images import OpenImagesSource
from megatron_eve.data.sources.source import RawRow, Source

# Columns of the list of pictures; annotations are CSV files with a column ImageID, too.
_COLUMNS = {"ImageID", "OriginalURL"}


@dataclass
class OpenImages(Preparer):
    """A picture alone a row, its caption empty; `meta` has the columns of the CSV under their published names.

    Rotation is kept and not applied, since the direction in which it counts is not documented. Rows of the CSV whose
    Subset is validation or test belong to those splits.
    """

    name: ClassVar[str] = "openimages"
    what: ClassVar[str] = "OpenImages v6, photographs without captions"
    layout: ClassVar[str] = (
        "pictures <ImageID>.jpg in any folders (V6Train1/ ...) and the CSV of their URLs, such as "
        "train-images-boxable-with-rotation.csv"
    )

    @property
    def image_root(self) -> Path:
        """The download itself."""
        return self.folder

    def files(self) -> list[Path]:
        """The CSV files with URLs; those of annotations and classes are not read."""
        found = [file for file in self.find("**/*.csv") if set(_header(file)) >= _COLUMNS]
        if not found:
            raise self.missing("CSV with the columns ImageID and OriginalURL")
        return found

    def open(self, files: Sequence[Path]) -> Source:
        """A reader of the CSV files."""
        return _OpenImagesSource(files, str(self.folder), self.allow_eval_splits)


class _OpenImagesSource(OpenImagesSource):
    def __init__(self, files: Sequence[Path], image_root: str, allow_eval_splits: bool) -> None:
        super().__init__(files, image_root)
        self._allow_eval_splits = allow_eval_splits

    def _make_record(self, row: RawRow) -> Record:
        record = super()._make_record(row)
        split = record.meta.get("Subset", "")
        if is_eval_split(split) and not self._allow_eval_splits:
            raise SkipRow(EVAL_SPLIT, f"Subset is {split}")
        return replace(record, source=OpenImages.name)


def _header(file: Path) -> list[str]:
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        return next(csv.reader([stream.readline(1 << 16)]), [])
