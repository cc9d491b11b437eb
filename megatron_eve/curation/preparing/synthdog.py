"""SynthDoG: generated pages of text, as parquet of the hub (synthdog-en) or as the generator of Donut writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_eve.curation.preparing.parquet_table import ParquetTable, check_columns, image_of, places
from megatron_eve.curation.preparing.preparer import Preparer
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.fields import parse_object, plain_text
from megatron_eve.data.sources.json_source import JsonSource
from megatron_eve.data.sources.source import RawRow, Source
from megatron_eve.data.text.turns import is_blank
from megatron_eve.models.text_format import IMAGE_TOKEN

PROMPT = (
    "OCR this image section by section, from top to bottom, and left to right. Do not insert line breaks in the output "
    "text. If a word is split due to a line break in the image, use a space instead."
)
"""The question of SynthDoG's rows in published mixtures of LLaVA's layout (ids synthdog_en_...). EVE's is not known."""


@dataclass
class SynthDog(Preparer):
    """A page a row; the answer is its text_sequence."""

    name: ClassVar[str] = "synthdog"
    what: ClassVar[str] = "SynthDoG-en, generated pages to be read"
    layout: ClassVar[str] = (
        "parquet files with the columns image and ground_truth, or train/metadata.jsonl with the pages beside it"
    )

    def files(self) -> list[Path]:
        """The parquet files, else the lists of pages."""
        parquet = ("*.parquet", "*/*.parquet")
        if self.folder.is_dir() and not any(any(self.folder.glob(pattern)) for pattern in parquet):
            return self.find("**/metadata.jsonl")
        return self.find(*parquet)

    @property
    def image_root(self) -> Path:
        """The download."""
        return self.folder

    def open(self, files: Sequence[Path]) -> Source:
        """A reader of the pages."""
        if files[0].suffix == ".parquet":
            check_columns(files, ("image", "ground_truth"))
            return _SynthDogTable(files)
        return _SynthDogLines(files, self.folder)


class _SynthDogTable(Source):
    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(files)
        self._table = ParquetTable(["image", "ground_truth"])

    def rows(self) -> Iterator[RawRow]:
        """The place of each row."""
        for file in self._files:
            for number, place in enumerate(places(file), start=1):
                yield RawRow(str(file), number, place)

    def _make_record(self, row: RawRow) -> Record:
        fields = self._table.row(row.payload)
        name = f"{Path(row.file).stem}-{row.number}"
        return _page(image_of(fields["image"], name), fields["ground_truth"], name)


class _SynthDogLines(JsonSource):
    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        super().__init__(files)
        self._folder = folder

    def _record(self, row: RawRow, fields: dict[str, object]) -> Record:
        name = fields.get("file_name")
        if not isinstance(name, str) or not name:
            raise SkipRow("questions_layout", f"file_name is {name!r:.80}")
        path = Path(row.file).parent.relative_to(self._folder) / name
        return _page(ImageFile(path=str(path)), fields.get("ground_truth"), name)


def _page(image: ImageFile, ground_truth: object, name: str) -> Record:
    """The conversation about a page; raises SkipRow if it has no text."""
    if not isinstance(ground_truth, str):
        raise SkipRow("questions_layout", f"ground_truth is {type(ground_truth).__name__}, not text")
    parse = parse_object(ground_truth.encode("utf-8", "surrogatepass"), "ground_truth").get("gt_parse")
    text = parse.get("text_sequence") if isinstance(parse, dict) else None
    changes: Counter[str] = Counter()
    answer = plain_text(text, "text_sequence", changes)
    if is_blank(answer):
        raise SkipRow("nothing_to_train", "text_sequence is blank")
    turns = [{"from": "human", "value": f"{IMAGE_TOKEN}\n{PROMPT}"}, {"from": "gpt", "value": answer}]
    return Record(name, SynthDog.name, "conversation", [image], turns, changes=changes)
