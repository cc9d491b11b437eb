"""Questions with short answers about charts and documents: those of a picture become turns of one conversation.

EVE's table of instructions lists 200K of DVQA, 18K of ChartQA and 10K of DocVQA, which fits their pictures and not
their questions, of which there are more. Each question asks for a short answer in the words of LLaVA
(`data/text/questions.py`), as each question of a benchmark does.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.fields import parse_object, plain_text
from megatron_eve.data.sources.json_reader import JsonReader
from megatron_eve.data.sources.source import RawRow, Source
from megatron_eve.data.text.questions import SHORT_ANSWER
from megatron_eve.data.text.turns import is_blank
from megatron_eve.models.text_format import IMAGE_TOKEN


class Question(NamedTuple):
    """One question about a picture.

    Attributes:
        text: as it is published.
        answer: the same.
        meta: what is kept of it, by name; the lists over a picture's questions go into its `meta`.
    """

    text: str
    answer: str
    meta: Mapping[str, Any] = {}


class PictureQuestions(NamedTuple):
    """Payload of a row.

    Attributes:
        picture: where its file is, or what `_image` needs to read it.
        questions: about it, in the order of the download.
        meta: of the picture.
    """

    picture: Any
    questions: list[Question]
    meta: Mapping[str, Any] = {}


class QuestionSource(Source):
    """Rows of one picture each with all its questions, in the order of the first of them.

    The parent reads all questions before the first row, about 500 bytes of memory for each.

    Args:
        files: that the questions are in.
        name: `source` of the records.
    """

    def __init__(self, files: Sequence[Path], name: str) -> None:
        super().__init__(files)
        self._name = name

    def rows(self) -> Iterator[RawRow]:
        """A row for each question that cannot be used, then one for each picture."""
        pictures: dict[Any, tuple[str, int, PictureQuestions]] = {}
        for file in self._files:
            for number, fields in self._fields(file):
                try:
                    if isinstance(fields, SkipRow):
                        raise fields
                    key, found = self._question(file, number, fields)
                    _check(found.questions[0])
                except SkipRow as skip:
                    yield RawRow(str(file), number, None, (skip.reason, skip.detail))
                    continue
                if key in pictures:
                    pictures[key][2].questions.extend(found.questions)
                else:
                    pictures[key] = (str(file), number, found)
        for name, number, found in pictures.values():
            yield RawRow(name, number, found)

    def _fields(self, file: Path) -> Iterator[tuple[int, dict[str, Any] | SkipRow]]:
        """Number and fields of each question of a file; SkipRow instead where they cannot be read.

        Raises:
            DataError: the file cannot be read further.
        """
        with JsonReader(file) as reader:
            for number, text in reader.texts():
                try:
                    yield number, parse_object(text)
                except SkipRow as skip:
                    yield number, skip

    @abstractmethod
    def _question(self, file: Path, number: int, fields: dict[str, Any]) -> tuple[Any, PictureQuestions]:
        """What identifies the picture of a question, and the picture with this one question.

        Raises:
            SkipRow: the fields are not of the layout.
        """

    def _image(self, picture: Any) -> ImageFile:
        """The picture of a row."""
        return ImageFile(path=picture)

    def _make_record(self, row: RawRow) -> Record:
        found: PictureQuestions = row.payload
        image = self._image(found.picture)
        changes: Counter[str] = Counter()
        turns: list[dict[str, str]] = []
        for question in found.questions:
            asked = plain_text(question.text, "question", changes).strip() + SHORT_ANSWER
            turns.append({"from": "human", "value": asked if turns else f"{IMAGE_TOKEN}\n{asked}"})
            turns.append({"from": "gpt", "value": plain_text(question.answer, "answer", changes).strip()})
        meta: dict[str, Any] = dict(found.meta)
        for name in found.questions[0].meta:
            meta[name] = [question.meta.get(name) for question in found.questions]
        return Record(
            id=None if image.path is None else Path(image.path).name,
            source=self._name,
            kind="conversation",
            images=[image],
            turns=turns,
            meta=meta,
            changes=changes,
        )


def text_of(fields: Mapping[str, Any], key: str) -> str:
    """A field that is a text, or a number, of which its digits are the text.

    Raises:
        SkipRow: it is not there, or something else.
    """
    value = fields.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise SkipRow("questions_layout", f"{key} is {value!r:.80}")
    return value


def _check(question: Question) -> None:
    if is_blank(question.text):
        raise SkipRow("questions_layout", "the question is blank")
    if is_blank(question.answer):
        raise SkipRow("nothing_to_train", "the answer is blank")
