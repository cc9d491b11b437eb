"""DVQA: bar charts with questions (github.com/kushalkafle/DVQA_dataset)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_eve.curation.preparing.preparer import Preparer
from megatron_eve.curation.preparing.short_questions import (
    PictureQuestions,
    Question,
    QuestionSource,
    text_of,
)
from megatron_eve.data.sources.source import Source


@dataclass
class Dvqa(Preparer):
    """A chart a row, its questions as turns. Answers stay as they are: counts as words, values as digits."""

    name: ClassVar[str] = "dvqa"
    what: ClassVar[str] = "DVQA, questions about bar charts"
    layout: ClassVar[str] = "train_qa.json, and the charts in images/ (bar_train_00000001.png)"

    def files(self) -> list[Path]:
        """The questions of the splits."""
        return self.find("*_qa.json", "*/*_qa.json")

    @property
    def image_root(self) -> Path:
        """Folder of the charts of all splits."""
        return self.folder / "images"

    def open(self, files: Sequence[Path]) -> Source:
        """A reader of the questions."""
        if not self.image_root.is_dir():
            raise self.missing("images/")
        return _DvqaSource(files, self.name)


class _DvqaSource(QuestionSource):
    def _question(self, file: Path, number: int, fields: dict[str, Any]) -> tuple[str, PictureQuestions]:
        picture = text_of(fields, "image")
        meta = {"question_id": fields.get("question_id")}
        question = Question(text_of(fields, "question"), text_of(fields, "answer"), meta)
        return picture, PictureQuestions(picture, [question])
