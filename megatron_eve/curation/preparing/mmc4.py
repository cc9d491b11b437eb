"""MMC4: web pages with their pictures, as documents or as pairs of a picture and its matched sentence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from megatron_eve.curation.preparing.preparer import Preparer
from megatron_eve.curation.preparing.reasons import NO_IMAGE
from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.fields import parse_object, plain_text
from megatron_eve.data.sources.json_source import JsonSource
from megatron_eve.data.sources.mmc4 import Mmc4Source, check_matrix, check_place
from megatron_eve.data.sources.source import RawRow, Source
from megatron_eve.models.text_format import IMAGE_TOKEN

_PICTURE_KEY = re.compile(rb'"image_name"\s*:')


@dataclass
class Mmc4(Preparer):
    """A document a row, each picture in front of its matched sentence (`data/sources/mmc4.py`).

    At most the first 6 pictures of a document that have a file are taken, those that have none are counted, and
    `meta` has the page's url, and raw_url and matched_sim for each picture.
    """

    name: ClassVar[str] = "mmc4"
    what: ClassVar[str] = "MMC4 (core or full), documents with pictures between their sentences"
    layout: ClassVar[str] = (
        "docs_shard_<n>_v3.jsonl (unzipped) and a folder images/ with the files image_name"
    )
    license: ClassVar[str] = "ODC-BY"

    @property
    def image_root(self) -> Path:
        """Folder of the pictures."""
        return self.folder / "images"

    def files(self) -> list[Path]:
        """The JSON lines files."""
        try:
            found = self.find("**/docs_*shard_*.jsonl")
        except DataError:
            if packed := next(self.folder.glob("**/docs_*shard_*.jsonl.zip"), None):
                raise DataError(f"{packed} is packed: unpack such files with unzip in its folder") from None
            raise
        if not self.image_root.is_dir():
            raise self.missing("folder images/")
        return found

    def open(self, files: Sequence[Path]) -> Source:
        """A reader of documents."""
        return _DocumentSource(files, str(self.image_root))


@dataclass
class Mmc4Pairs(Mmc4):
    """A picture a row, with its matched sentence as the caption; all pictures of a document are taken."""

    name: ClassVar[str] = "mmc4_pairs"
    what: ClassVar[str] = "MMC4, each picture with its matched sentence"

    def open(self, files: Sequence[Path]) -> Source:
        """A reader of pairs."""
        return _PairSource(files, str(self.image_root))


class _DocumentSource(Mmc4Source):
    def _make_record(self, row: RawRow) -> Record:
        try:
            return replace(super()._make_record(row), id=_document_id(row), source=Mmc4.name)
        except SkipRow as skip:
            skip.id = _document_id(row)
            raise


class _PairSource(JsonSource):
    """A row for each picture of each document. The payload is the text of the line and the picture's number."""

    _read: tuple[bytes, dict[str, Any]] | None = None  # the last line, which its other pictures need again

    def rows(self) -> Iterator[RawRow]:
        """Pictures in the order of the list; a line without any is one row, which is skipped."""
        for row in super().rows():
            # Keys cannot occur in sentences, where their quotes are escaped. Parsing is the workers' part.
            for number in range(len(_PICTURE_KEY.findall(row.payload)) or 1):
                yield row._replace(payload=(row.payload, number))

    def _make_record(self, row: RawRow) -> Record:
        text, number = row.payload
        name = f"{_document_id(row)}:{number}"
        try:
            if self._read is None or self._read[0] is not text:
                self._read = text, parse_object(text)
            return replace(self._record(row, self._read[1]), id=name)
        except SkipRow as skip:
            skip.id = name
            raise

    def _record(self, row: RawRow, fields: dict[str, Any]) -> Record:
        sentences = fields.get("text_list")
        if not isinstance(sentences, list):
            raise SkipRow(
                "document_layout", f"'text_list' is {type(sentences).__name__}, not a list of sentences"
            )
        found, number = fields.get("image_info"), row.payload[1]
        if not isinstance(found, list) or not all(isinstance(picture, dict) for picture in found):
            raise SkipRow("document_layout", "'image_info' is not a list of objects")
        check_matrix(fields.get("similarity_matrix"), len(found), len(sentences))
        if number >= len(found):
            raise SkipRow(NO_IMAGE, f"{len(found)} pictures in 'image_info'")
        picture = found[number]
        file, place = picture.get("image_name"), picture.get("matched_text_index")
        if not isinstance(file, str) or not file:
            raise SkipRow("image_field", f"'image_name' of picture {number} is {file!r:.80}")
        check_place(place, number, len(sentences))
        meta = {"url": fields.get("url"), **{key: picture.get(key) for key in ("raw_url", "matched_sim")}}
        changes: Counter[str] = Counter()
        caption = plain_text(sentences[place], f"sentence {place} of 'text_list'", changes)
        return Record(
            id=None,
            source=Mmc4Pairs.name,
            kind="pair",
            images=[ImageFile(path=file)],
            turns=[{"from": "gpt", "value": IMAGE_TOKEN + caption}],
            meta=meta,
            changes=changes,
        )


def _document_id(row: RawRow) -> str:
    """Shard and line of a document, which has no id of its own."""
    return f"{Path(row.file).stem}:{row.number}"
