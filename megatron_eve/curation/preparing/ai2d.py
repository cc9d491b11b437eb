"""AI2D: diagrams of school books with multiple-choice questions (allenai.org/data/diagrams)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_eve.curation.preparing.choice_labels import Label, draw_labels, read_labels
from megatron_eve.curation.preparing.preparer import Preparer
from megatron_eve.curation.preparing.reasons import EVAL_SPLIT
from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.fields import parse_object, plain_text
from megatron_eve.data.sources.image_files import read_image_file
from megatron_eve.data.sources.source import RawRow, Source
from megatron_eve.data.text.questions import LETTER, LETTERS, options
from megatron_eve.data.text.turns import is_blank
from megatron_eve.models.text_format import IMAGE_TOKEN

_TEST_IDS = "ai2d_test_ids.csv"
_NO_CHOICE = "{}"  # what stands in the place of a choice where a question has fewer


@dataclass
class Ai2d(Preparer):
    """A multiple-choice question a row; its answer is a letter.

    A question with "abcLabel" names parts of the diagram by letters, which are drawn on the picture from its
    annotations (`choice_labels.py`). Without these its row is left out. The archive does not say which diagrams are of
    the test split; ai2d_test_ids.csv does.
    """

    follow_links: bool = False  # of the pictures that letters are drawn on

    name: ClassVar[str] = "ai2d"
    what: ClassVar[str] = "AI2D, questions about diagrams"
    layout: ClassVar[str] = (
        "what ai2d-all.zip holds (questions/0.png.json, images/0.png, annotations/0.png.json), and beside it "
        f"{_TEST_IDS}, a number of a test picture a line"
    )

    def files(self) -> list[Path]:
        """The questions of each picture."""
        files = self.find("questions/*.json", "*/questions/*.json")
        return sorted(files, key=lambda file: (file.parent, len(file.name), file.name))

    def open(self, files: Sequence[Path]) -> Source:
        """A reader of the questions."""
        if len(folders := {file.parent for file in files}) > 1:
            raise DataError(
                f"--source {self.folder} has {len(folders)} folders questions/: name the folder of one download"
            )
        folder = files[0].parent.parent
        if not (folder / "images").is_dir():
            raise self.missing(f"{(folder / 'images').relative_to(self.folder)}/")
        test_ids = frozenset[str]() if self.allow_eval_splits else self._test_ids(folder)
        return _Ai2dSource(files, self.folder, folder.relative_to(self.folder), test_ids, self.follow_links)

    @property
    def image_root(self) -> Path:
        """The download."""
        return self.folder

    def _test_ids(self, folder: Path) -> frozenset[str]:
        places = (folder / _TEST_IDS, self.folder / _TEST_IDS)
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise DataError(
                f"--source {self.folder} has no {_TEST_IDS}, which names the diagrams of the test split: download it "
                "from the page of AI2D, or add --allow-eval-splits to take all diagrams"
            )
        lines = path.read_text(encoding="utf-8", errors="replace").split()
        if not lines or not all(line.isdigit() for line in lines):
            raise DataError(f"{path} is not a list of numbers, one a line: download it again")
        return frozenset(lines)


class _Ai2dSource(Source):
    """Questions of AI2D.

    Args:
        files: questions/*.json.
        root: the download.
        folder: of images/ and annotations/, relative to `root`.
        test_ids: pictures that are left out, by their names without suffix.
        follow_links: of pictures, as --follow-links.
    """

    def __init__(
        self, files: Sequence[Path], root: Path, folder: Path, test_ids: frozenset[str], follow_links: bool
    ) -> None:
        super().__init__(files)
        self._root = root
        self._folder = folder
        self._test_ids = test_ids
        self._follow_links = follow_links

    def rows(self) -> Iterator[RawRow]:
        """The name of the picture, the text and the fields of each question."""
        for file in self._files:
            try:
                content = parse_object(file.read_bytes())
                picture, questions = content.get("imageName"), content.get("questions")
                if not isinstance(picture, str) or Path(picture).name != picture:
                    raise SkipRow("questions_layout", f"imageName is {picture!r:.80}")
                if not isinstance(questions, dict):
                    raise SkipRow("questions_layout", "it has no questions")
            except OSError as error:
                raise DataError(f"cannot read {file} ({error.strerror})") from error
            except SkipRow as skip:
                yield RawRow(str(file), 1, None, (skip.reason, skip.detail))
                continue
            for number, (question, fields) in enumerate(questions.items(), start=1):
                yield RawRow(str(file), number, (picture, question, fields))

    def _make_record(self, row: RawRow) -> Record:
        picture, question, fields = row.payload
        if not isinstance(fields, dict):
            raise SkipRow("questions_layout", f"a question is {type(fields).__name__}")
        identifier = str(fields.get("questionId") or f"{picture}-{row.number}")
        try:
            if Path(picture).stem in self._test_ids:
                raise SkipRow(EVAL_SPLIT, f"{picture} is in {_TEST_IDS}")
            changes: Counter[str] = Counter()
            choices, right = _choices(fields, changes)
            text = plain_text(question, "question", changes)
            image = ImageFile(path=str(self._folder / "images" / picture))
            if labelled := fields.get("abcLabel") is True:
                labels = self._labels(picture, choices)
                data = read_image_file(str(self._root), str(image.path), self._follow_links)
                image = ImageFile(data=draw_labels(data, labels), path=f"{Path(picture).stem}_labels.png")
        except SkipRow as skip:
            skip.id, skip.image = identifier, picture
            raise
        return Record(
            id=identifier,
            source=Ai2d.name,
            kind="conversation",
            images=[image],
            turns=[
                {"from": "human", "value": f"{IMAGE_TOKEN}\n{text.strip()}{options(choices)}{LETTER}"},
                {"from": "gpt", "value": LETTERS[right]},
            ],
            meta={"image": picture, "abcLabel": labelled},
            changes=changes,
        )

    def _labels(self, picture: str, choices: Sequence[str]) -> dict[str, Label]:
        """The labels of a picture, which choices name; raises SkipRow if they cannot be drawn."""
        path = self._root / self._folder / "annotations" / f"{picture}.json"
        try:
            labels = read_labels(parse_object(path.read_bytes(), path.name))
        except OSError as error:
            raise SkipRow("choice_labels", f"{path.name}: {error.strerror}") from None
        if missing := [one for one in choices if _is_label(one) and one.upper() not in labels]:
            raise SkipRow("choice_labels", f"{path.name} has no rectangle of {', '.join(missing)}")
        if not any(one.upper() in labels for one in choices):
            raise SkipRow("choice_labels", f"{path.name} has none of {', '.join(choices)!s:.80}")
        return labels


def _is_label(choice: str) -> bool:
    """Whether a choice of a question with "abcLabel" is a letter on the picture, not a text such as "none"."""
    return len(choice) == 1 and choice.upper() in LETTERS


def _choices(fields: Mapping[str, Any], changes: Counter[str]) -> tuple[list[str], int]:
    """The choices that a question has, and the index of the right one among them.

    Raises:
        SkipRow: the index is out of range, or that of no choice.
    """
    given, right = fields.get("answerTexts"), fields.get("correctAnswer")
    if not isinstance(given, list) or len(given) > len(LETTERS):
        raise SkipRow("questions_layout", f"answerTexts is {given!r:.80}")
    texts = [plain_text(text, "answerTexts", changes).strip() for text in given]
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(texts):
        raise SkipRow("answer_index", f"correctAnswer is {right!r:.80}, and there are {len(texts)} choices")
    kept = [number for number, text in enumerate(texts) if text != _NO_CHOICE and not is_blank(text)]
    if right not in kept:
        raise SkipRow("answer_index", f"correctAnswer is {right}, and that choice is {texts[right]!r}")
    return [texts[number] for number in kept], kept.index(right)
