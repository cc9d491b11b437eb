"""EVE-HD's instructions: the published JSON of 1.8 million rows, or the data sets that it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from megatron_eve.curation.preparing.ai2d import Ai2d
from megatron_eve.curation.preparing.chartqa import ChartQa
from megatron_eve.curation.preparing.docvqa import DocVqa
from megatron_eve.curation.preparing.dvqa import Dvqa
from megatron_eve.curation.preparing.llava import (
    Bunny,
    ConversationSource,
    LlavaMix665k,
    VisionFlan,
    require_folder,
)
from megatron_eve.curation.preparing.preparer import Preparer
from megatron_eve.curation.preparing.synthdog import SynthDog
from megatron_eve.data.errors import DataError
from megatron_eve.data.format.metadata import license_of
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.source import RawRow, Source

PARTS: tuple[type[Preparer], ...] = (LlavaMix665k, Ai2d, SynthDog, Dvqa, ChartQa, DocVqa, VisionFlan, Bunny)
"""The data sets of the mixture, in the order of EVE's docs/Data.md."""


@dataclass
class EveHd(Preparer):
    """The mixture as it is published, or all its data sets, each in a folder with the name of its preparer.

    The parts give more rows than the JSON: EVE took some of them (30,000 pages of SynthDoG, say), and which is not
    published; and many rows of Bunny-695K are in mix-665K, too. `tools/curate.py duplicates` finds the same pictures.
    """

    follow_links: bool = False  # of AI2D

    name: ClassVar[str] = "eve_hd"
    what: ClassVar[str] = "EVE-HD's mixture of 1.8 million instructions"
    layout: ClassVar[str] = (
        "eve_instruct_mix1.8m.json and the pictures in ai2d, chartqa, coco ... as EVE's docs/Data.md has them; or "
        f"without that file the folders {', '.join(part.name for part in PARTS)}, each as its own preparer expects it"
    )

    def files(self) -> list[Path]:
        """The JSON file, else the files of the parts."""
        name = "[Ee][Vv][Ee]_instruct_mix1.8[Mm].json"
        parts = [part for part in self._parts() if part.folder.is_dir()]
        if any(self.folder.glob(name)) or not parts:
            return self.find(name)
        if absent := [part.name for part in self._parts() if not part.folder.is_dir()]:
            raise DataError(
                f"--source {self.folder} has neither eve_instruct_mix1.8m.json nor the folders {', '.join(absent)}: "
                f"add them, or prepare {', '.join(part.name for part in parts)} one by one"
            )
        files = []
        for part in parts:
            files += part.files()
            self.left_out += part.left_out
        return files

    @property
    def image_root(self) -> Path:
        """The download."""
        return self.folder

    def open(self, files: Sequence[Path]) -> Source:
        """A reader of the JSON file, or of the parts."""
        if files[0].parent == self.folder:
            require_folder(self, "ai2d", "chartqa", "coco", "docvqa", "dvqa", "gqa", "open_images", "syndog")
            return ConversationSource(
                files, self.name, by_folder=True, allow_eval_splits=self.allow_eval_splits
            )
        opened = []
        for part in self._parts():
            own = [file for file in files if part.folder in file.parents]
            opened.append((part, part.open(own)))
        return _Parts(files, self.folder, opened)

    def _parts(self) -> list[Preparer]:
        parts = [part(self.folder / part.name, self.allow_eval_splits) for part in PARTS]
        for part in parts:
            if isinstance(part, Ai2d):
                part.follow_links = self.follow_links
        return parts


class _Parts(Source):
    """Rows of several downloads, one after the other."""

    def __init__(self, files: Sequence[Path], folder: Path, parts: list[tuple[Preparer, Source]]) -> None:
        super().__init__(files)
        self._folder = folder
        self._parts = parts

    def rows(self) -> Iterator[RawRow]:
        """Rows with the number of their part."""
        for number, (_, source) in enumerate(self._parts):
            for row in source.rows():
                yield row._replace(payload=(number, row.payload))

    def _make_record(self, row: RawRow) -> Record:
        number, payload = row.payload
        part, source = self._parts[number]
        record = source.record(row._replace(payload=payload))
        meta: dict[str, Any] = dict(record.meta)
        if license_of(meta) is None and part.license is not None:
            meta["license"] = part.license
        return replace(record, meta=meta, images=[self._below(part, image) for image in record.images])

    def _below(self, part: Preparer, image: ImageFile) -> ImageFile:
        """An image whose path is relative to the folder of all parts."""
        if image.data is not None or image.path is None:
            return image
        root = (part.image_root or part.folder).relative_to(self._folder)
        return replace(image, path=str(root / image.path))
