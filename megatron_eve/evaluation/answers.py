"""Answers on disk: JSON lines, one file a shard, appended batch by batch.

A file begins with a head: what the answers depend on, `{"head": {"model": ..., "data": ..., "versions": ...}}`. A run
that asks more tasks appends another head with their data. Each other line is an answer, `{"key", "task", "split",
"doc_id", "number", ...}` with "text" of a generated answer, or "log_likelihood" and "is_greedy", or "error". A key is
answered once; all files of the folder are read, so that a later run may cut the requests otherwise.

Where the answer is a picture, "text" is the path of a PNG file below the folder (`picture_path`), which is on disk
before its line is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.requests import Request
from megatron_eve.inference.origin import AnswerOrigin
from megatron_eve.inference.questions import open_locked

PICTURES = "pictures"
"""Folder of pictures, below that of the answers."""
TOWER = "--tower"
"""In the place of a dataset's path: the tower that makes pictures of codes."""
_BEGINS = (b'{"head": ', b'{"key": ')


@dataclass(frozen=True)
class Answered:
    """The answer to a request.

    Attributes:
        text: of a generated answer, or the path of a picture below the folder; empty with an error.
        log_likelihood: the sum of the continuation's log probabilities.
        is_greedy: each of its tokens is the most likely one.
        images: sha256 of each picture that the model was given.
        error: why there is no answer.
    """

    text: str = ""
    log_likelihood: float | None = None
    is_greedy: bool = False
    images: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Head:
    """What all answers of a folder depend on.

    Attributes:
        model: which model, as `AnswerOrigin.to_metadata`.
        data: digest of each dataset's folder, by its path below the data root.
        versions: of the programs, by name; told, not compared.
    """

    model: Mapping[str, Any]
    data: Mapping[str, str]
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_line(self) -> str:
        """As a line of a file."""
        return json.dumps({"head": asdict(self)}) + "\n"


@dataclass
class Answers:
    """The answers of a folder.

    Attributes:
        head: the model, and the data of all its files together; None if there is no file.
        found: answer by key.
    """

    head: Head | None
    found: dict[str, Answered]


def read_answers(folder: Path, flag: str) -> Answers:
    """Read all files of a folder; what another process is writing at this moment counts as not there yet.

    Raises:
        DataError: a line that is no answer, or files of two models or of two versions of the data.
    """
    answers = Answers(None, {})
    for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else []:
        content = path.read_bytes()
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
            place = f"{flag} {path}, line {number}"
            try:
                row = json.loads(line)
                if "head" in row:
                    answers.head = _joined(answers.head, Head(**row["head"]), place)
                elif answers.head is None:
                    raise KeyError("head")
                else:
                    answers.found.setdefault(row["key"], _answer(row))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(
                    f"{place}: not an answer of tools/evaluate.py; remove that line, or name another folder"
                ) from None
    return answers


def _joined(one: Head | None, other: Head, place: str) -> Head:
    if one is None:
        return other
    if difference := AnswerOrigin(**{"tower_sha256": None, **other.model}).difference(dict(one.model)):
        raise DataError(
            f"{place}: the answers of another file of this folder differ from it: one {difference}; keep the answers "
            "of each model in a folder of its own"
        )
    for name in sorted(one.data.keys() & other.data.keys()):
        if one.data[name] != other.data[name]:
            raise DataError(
                f"{place}: other answers of this folder are to another version of the data in {name}; keep the answers "
                "to each version in a folder of its own"
            )
    return Head(one.model, {**one.data, **other.data}, one.versions)


def check_head(found: Head | None, now: Head, folder: Path) -> None:
    """Refuse to add answers of another model, or to other data, to those of a folder.

    Raises:
        DataError: naming the difference.
    """
    if found is None:
        return
    difference = AnswerOrigin(**{"tower_sha256": None, **now.model}).difference(dict(found.model))
    if difference:
        raise DataError(f"--answers {folder}: an answer there {difference}; name another folder")
    check_data(found, now.data, folder)


def check_data(found: Head, now: Mapping[str, str], folder: Path) -> None:
    """Refuse data that has changed since the answers were given."""
    for name in sorted(found.data.keys() & now.keys()):
        if found.data[name] != now[name]:
            if name == TOWER:
                raise DataError(
                    f"--answers {folder}: its pictures are of another {TOWER}; name another folder"
                )
            raise DataError(
                f"--answers {folder}: its answers are to other files than those in {name} of --data-root now; name "
                "another folder, or bring the data back"
            )


def picture_path(request: Request) -> str:
    """Where the picture of an answer goes, relative to the folder of the answers."""
    return f"{PICTURES}/{request.key[:2]}/{request.key}.png"


def write_picture(folder: Path, request: Request, pixels: NDArray[np.uint8]) -> str:
    """Write the picture of an answer, whole or not at all; returns its path below the folder.

    Args:
        folder: of the answers.
        request: that it answers.
        pixels: [height, width, 3].
    """
    path = folder / picture_path(request)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of two processes with the same request each writes a file of its own, and both give the same picture.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            Image.fromarray(pixels).save(file, "PNG")
            file.flush()
            os.fsync(file.fileno())  # on disk before the line that names it
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return picture_path(request)


def _answer(row: Mapping[str, Any]) -> Answered:
    if not isinstance(row["key"], str):
        raise TypeError
    return Answered(
        text=row.get("text", ""),
        log_likelihood=row.get("log_likelihood"),
        is_greedy=row.get("is_greedy", False),
        images=tuple(row.get("images", ())),
        error=row.get("error"),
    )


class ShardFile:
    """The file of one shard, to which answers are appended. A context manager: it locks the file, and closes it.

    Args:
        path: the file; it and its folder are made where they are missing.
        head: of this run; written in front, and again where it says more than what is there.

    Raises:
        DataError: another process writes it, or its end is none of a line of answers. The file is left as it is.
    """

    def __init__(self, path: Path, head: Head) -> None:
        self._file = open_locked(
            path, f"--answers {path}: another process is writing it; give each process a --shard of its own"
        )
        try:
            self._open(path, head)
        except BaseException:
            self._file.close()
            raise

    def _open(self, path: Path, head: Head) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if torn := content[whole:]:  # cut off in the middle of a write
            if not (
                any(torn.startswith(one) or one.startswith(torn) for one in _BEGINS) or not torn.strip(b"\0")
            ):
                raise DataError(
                    f"--answers {path}: not an answers file of tools/evaluate.py; name another folder"
                )
            self._file.truncate(whole)
        written = [
            json.loads(line)["head"] for line in content[:whole].split(b"\n") if line.startswith(_BEGINS[0])
        ]
        known = {name: digest for one in written for name, digest in one["data"].items()}
        if not written or not head.data.items() <= known.items():
            self._write(head.to_line())

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, answered: Iterable[tuple[Request, Answered]]) -> None:
        """Append answers, and flush them to disk."""
        self._write("".join(_line(request, answer) for request, answer in answered))

    def _write(self, text: str) -> None:
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def _line(request: Request, answer: Answered) -> str:
    row: dict[str, Any] = {
        "key": request.key,
        "task": request.task,
        "split": request.split,
        "doc_id": request.doc_id,
        "number": request.number,
    }
    if answer.error is not None:
        row["error"] = answer.error
    elif request.kind != "log_likelihood":
        row |= {"prompt": request.context, "text": answer.text}
    else:
        row |= {
            "continuation": request.continuation,
            "log_likelihood": answer.log_likelihood,
            "is_greedy": answer.is_greedy,
        }
    if answer.images:
        row["images"] = list(answer.images)
    return json.dumps(row) + "\n"  # ASCII: halves of surrogate pairs and control characters stay escaped


class MissingAnswers(DataError):
    """Requests without an answer.

    Attributes:
        counts: of each task.
    """

    def __init__(self, counts: Mapping[str, int]) -> None:
        super().__init__(", ".join(f"{task} {count:,}" for task, count in counts.items()))
        self.counts = counts


def missing_by_task(requests: Sequence[Request], found: Mapping[str, Answered]) -> dict[str, int]:
    """How many requests of each task have no answer; tasks that miss none are left out."""
    counts: dict[str, int] = {}
    for request in requests:
        if request.key not in found:
            counts[request.task] = counts.get(request.task, 0) + 1
    return counts
