"""Questions and answers as the published evaluations keep them: one JSON object a line.

A question is `{"question_id", "image", "text"}`, an answer `{"question_id", "prompt", "text", "answer_id", "model_id",
"metadata"}`. Answers are only ever appended, so a run that was killed goes on where its file ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eve.data.conversation import ConversationError, prompt_text
from megatron_eve.data.errors import DataError


@dataclass(frozen=True)
class Question:
    """One line of a question file.

    Attributes:
        id: `question_id`; the two questions that MME asks about each picture share one.
        images: file names, none for a question without a picture.
        text: the question as it stands in the file.
        prompt: what the model is to continue, with an `<image>` for each picture.
    """

    id: str | int
    images: tuple[str, ...]
    text: str
    prompt: str

    @property
    def key(self) -> tuple[str | int, str]:
        """What an answer repeats of its question, and is found by."""
        return self.id, self.text


def read_questions(path: Path, conv_mode: str) -> list[Question]:
    """Read a question file whole and make its prompts.

    Raises:
        DataError: a line that is not a question, or the same question twice; names file and line.
    """
    questions: list[Question] = []
    lines: dict[tuple[str | int, str], int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                question = _question(json.loads(line), conv_mode)
                if question.key in lines:
                    raise ValueError(f"the same question_id and text as in line {lines[question.key]}")
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: {error}") from error
            lines[question.key] = number
            questions.append(question)
    return questions


def _question(row: object, conv_mode: str) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, not an object")
    name, images, text = row.get("question_id"), row.get("image"), row.get("text")
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise ValueError('no "question_id" that is a text or a whole number')
    if images is None:
        images = []
    elif isinstance(images, str):
        images = [images]
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise ValueError('"image" is neither a file name nor a list of file names')
    if text is None and conv_mode == "plain":
        text = ""
    if not isinstance(text, str):
        raise ValueError('no "text" with the question')
    try:
        json.dumps([name, images, text], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair") from None
    try:
        return Question(name, tuple(images), text, prompt_text(text, conv_mode, len(images)))
    except ConversationError as error:
        raise ValueError(str(error)) from error


def chunk(questions: Sequence[Question], count: int, index: int) -> Sequence[Question]:
    """The part of a shard, as published: `count` runs of equal length, the last ones shorter or empty."""
    size = max(1, -(-len(questions) // count))
    return questions[index * size : (index + 1) * size]


class AnswersFile:
    """The answers of one shard, appended batch by batch. A context manager: it locks the file, and closes it.

    Args:
        path: the file; it and its folder are made where they are missing.
        questions: of this shard.
        model_id: what the answers say of the model.

    Attributes:
        missing: questions without an answer, in their order.
        resumed: answers that were there.
        damaged: those among them that hold an error in place of an answer.

    Raises:
        DataError: another process writes it, a line that is no answer, or one to another question or of another model.
    """

    def __init__(self, path: Path, questions: Sequence[Question], model_id: str) -> None:
        self._model_id = model_id
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(path, questions)
        except BlockingIOError:
            self._file.close()
            raise DataError(f"--answers-file {path}: another process is writing it") from None
        except BaseException:
            self._file.close()
            raise

    def _read(self, path: Path, questions: Sequence[Question]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1  # what follows was cut off in the middle of a write
        known = {question.key for question in questions}
        found: set[tuple[Any, Any]] = set()
        self.damaged = 0
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                row = json.loads(line)
                key, model = (row["question_id"], row["prompt"]), row["model_id"]
                self.damaged += "error" in row["metadata"]
                if key not in known:
                    raise DataError(
                        f"{path}, line {number}: an answer to a question that this run does not ask"
                    )
                if model != self._model_id:
                    raise DataError(
                        f"{path}, line {number}: an answer of {model}; give {self._model_id} another file"
                    )
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(f"{path}, line {number}: not an answer of tools/generate.py") from error
            found.add(key)
        if whole < len(content):
            self._file.truncate(whole)
        self.missing = [question for question in questions if question.key not in found]
        self.resumed = len(found)

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, answered: Iterable[tuple[Question, str, str | None]]) -> None:
        """Add (question, answer, error or None), on disk before this returns."""
        lines = [json.dumps(self._row(*one), ensure_ascii=False) + "\n" for one in answered]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _row(self, question: Question, text: str, error: str | None) -> dict[str, object]:
        # A name of its own for each answer, as published, but the same in every run of the same model's name.
        name = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([self._model_id, *question.key]))
        return {
            "question_id": question.id,
            "prompt": question.text,
            "text": text,
            "answer_id": name.hex,
            "model_id": self._model_id,
            "metadata": {} if error is None else {"error": error},
        }
