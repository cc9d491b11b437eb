"""DocVQA: pages of scanned documents with questions (docvqa.org)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_eve.curation.preparing.preparer import Preparer
from megatron_eve.curation.preparing.reasons import EVAL_SPLIT
from megatron_eve.curation.preparing.short_questions import (
    PictureQuestions,
    Question,
    QuestionSource,
    text_of,
)
from megatron_eve.curation.preparing.splits import is_eval_split
from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.sources.fields import parse_object
from megatron_eve.data.sources.source import Source

_OF_PAGE = ("docId", "ucsf_document_id", "ucsf_document_page_no")


@dataclass
class DocVqa(Preparer):
    """A page a row, its questions as turns; of several answers the first.

    `meta` has docId, ucsf_document_id, ucsf_document_page_no, and questionId and question_types of each question.
    """

    name: ClassVar[str] = "docvqa"
    what: ClassVar[str] = "DocVQA, questions about scanned pages"
    layout: ClassVar[str] = "train_v1.0_withQT.json, and beside it the pages in documents/"

    def files(self) -> list[Path]:
        """The questions of the splits."""
        return self.find("*_v1.0*.json", "*/*_v1.0*.json")

    @property
    def image_root(self) -> Path:
        """The download: names of pages begin with their folder."""
        return self.folder

    def open(self, files: Sequence[Path]) -> Source:
        """A reader of the questions."""
        for file in files:
            if not (file.parent / "documents").is_dir():
                raise self.missing(f"{(file.parent / 'documents').relative_to(self.folder)}/")
        return _DocVqaSource(files, self.name, self.folder, self.allow_eval_splits)


class _DocVqaSource(QuestionSource):
    def __init__(self, files: Sequence[Path], name: str, folder: Path, allow_eval_splits: bool) -> None:
        super().__init__(files, name)
        self._folder = folder
        self._allow_eval_splits = allow_eval_splits

    def _fields(self, file: Path) -> Iterator[tuple[int, dict[str, Any] | SkipRow]]:
        """The questions stand in a list inside of an object; the file has 40,000 of them and fits into memory."""
        try:
            rows = parse_object(file.read_bytes()).get("data")
        except OSError as error:
            raise DataError(f"cannot read {file} ({error.strerror})") from error
        except SkipRow as error:
            raise DataError(f"{file} is damaged ({error.detail}): download it again") from error
        if not isinstance(rows, list):
            raise DataError(f"{file} has no list 'data': it is not a file of DocVQA's questions")
        for number, row in enumerate(rows, start=1):
            yield number, row if isinstance(row, dict) else SkipRow("not_an_object", type(row).__name__)

    def _question(self, file: Path, number: int, fields: dict[str, Any]) -> tuple[str, PictureQuestions]:
        split = fields.get("data_split")
        if isinstance(split, str) and is_eval_split(split) and not self._allow_eval_splits:
            raise SkipRow(EVAL_SPLIT, f"data_split is {split}")
        answers = fields.get("answers")
        if not isinstance(answers, list) or not answers or not isinstance(answers[0], str):
            raise SkipRow("questions_layout", f"answers is {answers!r:.80}")
        picture = str(file.parent.relative_to(self._folder) / text_of(fields, "image"))
        meta = {key: fields.get(key) for key in ("questionId", "question_types")}
        question = Question(text_of(fields, "question"), answers[0], meta)
        page = {key: fields[key] for key in _OF_PAGE if fields.get(key) is not None}
        return picture, PictureQuestions(picture, [question], page)
