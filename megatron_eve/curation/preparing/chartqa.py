"""ChartQA: charts with questions (github.com/vis-nlp/ChartQA), as JSON files or as parquet of the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_eve.curation.preparing.parquet_table import (
    ParquetTable,
    Place,
    check_columns,
    image_of,
    places,
)
from megatron_eve.curation.preparing.preparer import Preparer
from megatron_eve.curation.preparing.short_questions import (
    PictureQuestions,
    Question,
    QuestionSource,
    text_of,
)
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import ImageFile
from megatron_eve.data.sources.source import Source

_TEXTS = ("imgname", "query", "label", "type")


@dataclass
class ChartQa(Preparer):
    """A chart a row, its questions as turns, those of people and those that were generated.

    `meta` has for each question its type, human or augmented.
    """

    name: ClassVar[str] = "chartqa"
    what: ClassVar[str] = "ChartQA, questions about charts"
    layout: ClassVar[str] = (
        "train/train_human.json, train/train_augmented.json and train/png/ (also in a folder of their own), or parquet "
        "files with the columns imgname, query, label, type, image"
    )
    license: ClassVar[str] = "GPL-3.0"

    def files(self) -> list[Path]:
        """The questions, as JSON where that is there."""
        patterns = ("*_human.json", "*_augmented.json")
        levels = ("", "*/", "*/*/")
        texts = [f"{level}{pattern}" for level in levels for pattern in patterns]
        if self.folder.is_dir() and not any(any(self.folder.glob(text)) for text in texts):
            return self.find("*.parquet", "*/*.parquet")
        return sorted(self.find(*texts), key=lambda file: (file.parent, "augmented" in file.name))

    @property
    def image_root(self) -> Path:
        """The download."""
        return self.folder

    def open(self, files: Sequence[Path]) -> Source:
        """A reader of the questions."""
        if files[0].suffix == ".parquet":
            check_columns(files, (*_TEXTS, "image"))
            return _ChartQaTable(files, self.name)
        for file in files:
            if not (file.parent / "png").is_dir():
                raise self.missing(f"{(file.parent / 'png').relative_to(self.folder)}/")
        return _ChartQaSource(files, self.name, self.folder)


class _ChartQaSource(QuestionSource):
    def __init__(self, files: Sequence[Path], name: str, folder: Path) -> None:
        super().__init__(files, name)
        self._folder = folder

    def _question(self, file: Path, number: int, fields: dict[str, Any]) -> tuple[str, PictureQuestions]:
        picture = str(file.parent.relative_to(self._folder) / "png" / text_of(fields, "imgname"))
        kind = "human" if file.stem.endswith("_human") else "augmented"
        return picture, PictureQuestions(picture, [_question(fields, kind)])


class _ChartQaTable(QuestionSource):
    """The parquet form, which repeats the picture in each of its questions: the first is read."""

    def __init__(self, files: Sequence[Path], name: str) -> None:
        super().__init__(files, name)
        self._pictures = ParquetTable(["image"])

    def _fields(self, file: Path) -> Iterator[tuple[int, dict[str, Any] | SkipRow]]:
        table = ParquetTable(_TEXTS)
        for number, place in enumerate(places(file), start=1):
            try:
                yield number, {**table.row(place), "place": place}
            except SkipRow as skip:
                yield number, skip

    def _question(self, file: Path, number: int, fields: dict[str, Any]) -> tuple[str, PictureQuestions]:
        name = text_of(fields, "imgname")
        picture = (name, fields["place"])
        return name, PictureQuestions(picture, [_question(fields, fields.get("type"))])

    def _image(self, picture: tuple[str, Place]) -> ImageFile:
        name, place = picture
        return image_of(self._pictures.row(place)["image"], name)


def _question(fields: dict[str, Any], kind: object) -> Question:
    label = fields.get("label")
    if isinstance(label, list) and len(label) == 1:
        fields = {**fields, "label": label[0]}
    return Question(text_of(fields, "query"), text_of(fields, "label"), {"type": kind})
