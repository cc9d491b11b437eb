"""Questions and answers as the published evaluations keep them: one JSON object a line.

A question is `{"question_id", "image", "text"}`, an answer `{"question_id", "prompt", "text", "answer_id", "model_id",
"metadata"}`. Answers are only ever appended, so a run that was killed goes on where its file ends. The origin of an
answer is in its `metadata`, which scorers do not read: model, settings, and name and sha256 of each picture.
"""

from __future__ import annotations

import codecs
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.text.prompts import prompt_text
from megatron_eve.data.text.turns import ConversationError
from megatron_eve.inference.origin import AnswerOrigin
from megatron_eve.models.text_format import Template

# How each row of an answers file begins.
_ROW_BEGINS = b'{"question_id": '


@dataclass(frozen=True)
class Question:
    """One line of a question file.

    Attributes:
        id: `question_id`; the two questions that MME asks about each picture share one.
        images: file names, none for a question without a picture.
        text: the question as in the file.
        prompt: what the model is to continue, with an `<image>` for each picture.
        problem: why it is invalid, for its row; None if it is valid.
    """

    id: str | int
    images: tuple[str, ...]
    text: str
    prompt: str
    problem: str | None = None

    @property
    def key(self) -> tuple[str | int, str]:
        """The fields that an answer repeats from its question, by which they are matched."""
        return self.id, self.text


@dataclass(frozen=True)
class QuestionFile:
    """The contents of a question file.

    Attributes:
        questions: in order, with the invalid ones (`Question.problem`).
        refused: a message for each other line, with file and line: it has no id, so no answer can refer to it.
    """

    questions: list[Question]
    refused: list[str]


def read_questions(path: Path, template: Template) -> QuestionFile:
    """Read a question file whole and make its prompts. Lines that are not questions are skipped.

    Raises:
        DataError: none of its lines is a question; names the reason for the first.
    """
    questions: list[Question] = []
    refused: list[str] = []
    lines: dict[tuple[str | int, str], int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise DataError(f"{path}: is UTF-16 text; save it as UTF-8")
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                question = _question(line, template)
                if question.key in lines:
                    raise ValueError(f"the same question_id and text as in line {lines[question.key]}")
            except (ValueError, RecursionError) as error:
                refused.append(f"{path}, line {number}: {error}")
                continue
            lines[question.key] = number
            questions.append(question)
    if not questions:
        first = refused[0] if refused else f"{path}: is empty"
        raise DataError(
            f"{first}; no line of it is a question: write each as an object on a line of its own, with question_id, "
            "image and text"
        )
    return QuestionFile(questions, refused)


def _question(line: bytes, template: Template) -> Question:
    """Parse a line as a question.

    Raises:
        ValueError: no answer could name it: not UTF-8, not JSON, or no `question_id`.
    """
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 text (byte {error.start + 1} of the line); save the file as UTF-8"
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, not an object")
    name, images, text = row.get("question_id"), row.get("image"), row.get("text")
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise ValueError('no "question_id" that is a text or a whole number')
    if not _is_text(name):
        raise ValueError('"question_id" holds half of a surrogate pair')
    try:
        images, text = _asked(images, text, template.name)
        return Question(name, images, text, prompt_text(text, template, len(images)))
    except (ValueError, ConversationError) as error:
        shown = text if isinstance(text, str) and _is_text(text) else ""
        return Question(name, (), shown, "", problem=str(error))


def _asked(images: object, text: object, conv_mode: str) -> tuple[tuple[str, ...], str]:
    """Image names and text of a question; ValueError with the reason if they are invalid."""
    if images is None:
        images = []
    elif isinstance(images, str):
        images = [images]
    if not isinstance(images, list) or not all(
        isinstance(image, str) and image and _is_text(image) for image in images
    ):
        raise ValueError('"image" is neither a file name nor a list of file names')
    if text is None and conv_mode == "plain":
        text = ""
    if not isinstance(text, str) or not (text.strip() or conv_mode == "plain"):
        raise ValueError('no "text" with the question')
    if not _is_text(text):
        raise ValueError('"text" holds half of a surrogate pair')
    if conv_mode == "plain" and not images:
        raise ValueError('no "image" to caption')
    return tuple(images), text


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _is_text(value: str | int) -> bool:
    """True if it can be written as UTF-8: JSON's escapes allow half of a surrogate pair, which cannot."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def chunk(questions: Sequence[Question], count: int, index: int) -> Sequence[Question]:
    """The part of a shard, as published: `count` runs of equal length, the last ones shorter or empty."""
    size = max(1, -(-len(questions) // count))
    return questions[index * size : (index + 1) * size]


@dataclass(frozen=True)
class AnswerRow:
    """The row that is written for a question.

    Attributes:
        question: it.
        text: the answer; empty with an error.
        image_digests: sha256 of each picture's file; None if it was not read.
        error: why there is no answer.
    """

    question: Question
    text: str
    image_digests: tuple[str | None, ...] = ()
    error: str | None = None


class AnswersFile:
    """The answers of one shard, appended batch by batch. A context manager: it locks the file, and closes it.

    Args:
        path: the file; it and its folder are made where they are missing.
        questions: of this shard.
        origin: what the answers come from; each row holds it.
        image_folder: image names are relative to it. Pictures of the answers that are there are read, to see whether
            they are still the same.

    Attributes:
        missing: questions without an answer, in their order.
        resumed: number of answers that the file had already.
        damaged: number of those that hold an error instead of an answer.

    Raises:
        DataError: another process writes it, a line that is no answer, or one to another question, to another picture,
            of another model or made with other settings. The file is left as it is.
    """

    def __init__(
        self, path: Path, questions: Sequence[Question], origin: AnswerOrigin, image_folder: Path
    ) -> None:
        self._origin, self._image_folder = origin, image_folder
        self._digests: dict[str, str | None] = {}
        self._file = open_locked(path, f"--answers-file {path}: another process is writing it")
        try:
            self._read(path, questions)
        except BaseException:
            self._file.close()
            raise

    def _read(self, path: Path, questions: Sequence[Question]) -> None:
        self._file.seek(0)
        content = self._file.read()
        size = len(content)
        whole = content.rfind(b"\n") + 1
        if _is_json(content[whole:]):  # a row whose line end an editor left out, or another file altogether
            content += b"\n"
            whole = len(content)
        known = {question.key: question for question in questions}
        answered: set[tuple[Any, Any]] = set()
        self.damaged = 0
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
                key, metadata = (row["question_id"], row["prompt"]), row["metadata"]
                question = known.get(key)
                self.damaged += "error" in metadata
                if question is None:
                    problem: str | None = "is to a question that this run does not ask"
                elif row["model_id"] != self._origin.model_id:
                    problem = f"came from {row['model_id']}, and this run's model is {self._origin.model_id}"
                else:
                    problem = self._origin.difference(metadata) or self._other_picture(question, metadata)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise DataError(
                    f"{path}, line {number}: not an answer of tools/generate.py; give this run another --answers-file"
                ) from None
            if problem:
                remedy = "remove that row, or " if "error" in metadata else ""
                raise DataError(
                    f"{path}, line {number}: this answer {problem}; {remedy}give this run another --answers-file"
                )
            answered.add(key)
        if torn := content[whole:]:
            if not (torn.startswith(_ROW_BEGINS) or _ROW_BEGINS.startswith(torn) or not torn.strip(b"\0")):
                raise DataError(
                    f"{path}: not an answers file of tools/generate.py; give this run another one"
                )
            self._file.truncate(whole)  # cut off in the middle of a write
        elif size < whole:
            self._file.write(b"\n")
        self.missing = [question for question in questions if question.key not in answered]
        self.resumed = len(answered)

    def _other_picture(self, question: Question, metadata: dict[str, Any]) -> str | None:
        """A message if an answer's pictures are not those of its question any more; else None."""
        names = [image["name"] for image in metadata["images"]]
        if names != list(question.images):
            return f"is about {', '.join(names) or 'no picture'}, not {', '.join(question.images) or 'no picture'}"
        for image in metadata["images"]:
            digest = self._digest(image["name"]) if image["sha256"] else None
            if digest is not None and digest != image["sha256"]:
                return f"is about another picture than {image['name']} is now"
        return None

    def _digest(self, name: str) -> str | None:
        """The sha256 of a picture's file; None if it cannot be read, which counts as equal."""
        if name not in self._digests:
            try:
                self._digests[name] = hashlib.sha256(read_picture(self._image_folder, name)).hexdigest()
            except SkipRow:
                self._digests[name] = None
        return self._digests[name]

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, answered: Iterable[AnswerRow]) -> None:
        """Append rows, and flush them to disk."""
        lines = [json.dumps(self._row(one), ensure_ascii=False) + "\n" for one in answered]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _row(self, answer: AnswerRow) -> dict[str, object]:
        question, digests = answer.question, answer.image_digests or (None,) * len(answer.question.images)
        # A name of its own for each answer, as published, but the same in every run of the same model's name.
        name = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([self._origin.model_id, *question.key]))
        pictures = [
            {"name": image, "sha256": digest} for image, digest in zip(question.images, digests, strict=True)
        ]
        error = {} if answer.error is None else {"error": answer.error}
        return {
            "question_id": question.id,
            "prompt": question.text,
            "text": answer.text,
            "answer_id": name.hex,
            "model_id": self._origin.model_id,
            "metadata": {**error, "images": pictures, **self._origin.to_metadata()},
        }


def open_locked(path: Path, in_use: str) -> BinaryIO:
    """Open a file to read it and append to it, locked until it is closed; it and its folder are made where missing.

    Raises:
        DataError: another process has it; the message is `in_use`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise DataError(in_use) from None
    except BaseException:
        file.close()
        raise
    return file


def read_picture(folder: Path, name: str) -> bytes:
    """A picture's file.

    Raises:
        SkipRow: it is missing, not a file, or cannot be read.
    """
    path = folder / name
    try:
        if path.exists() and not path.is_file():
            raise SkipRow("image_missing", f"{name}: not a file")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, SkipRow):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SkipRow("image_missing", f"{name}: {reason}") from error
