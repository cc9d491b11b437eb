"""The answers of a captioning model to one shard, on disk while it works: JSON lines, appended batch by batch.

A line is `{"row", "prompt", "caption"}`, or `{"row", "reason", "detail"}` of a row that has no answer. Lines stand in
the order of the rows, and each batch is on disk before the next begins. After a kill the file is cut at the last whole
batch, so that batches are the same as in one run: on a GPU rounding may let an answer depend on its batch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_eve.data.errors import DataError
from megatron_eve.inference.questions import open_locked


@dataclass(frozen=True)
class CaptionAnswer:
    """What became of one row.

    Attributes:
        row: number in the shard.
        prompt: that the model was asked with; None where it was not asked.
        caption: its answer; None where there is none.
        reason: why there is none; None of an answer, and of a row that is not asked for a caption.
        detail: of the reason.
    """

    row: int
    prompt: str | None = None
    caption: str | None = None
    reason: str | None = None
    detail: str | None = None

    def to_line(self) -> str:
        """As a line of the file; ASCII, so that control characters and halves of surrogate pairs stay escaped."""
        filled = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(filled) + "\n"


class CaptionAnswers:
    """The file of one shard. A context manager: it locks the file, and closes it.

    Args:
        path: the file; it and its folder are made where they are missing.
        rows: of the shard that are to be answered, in order.
        batch_size: rows of a batch.

    Attributes:
        found: answers of whole batches, in order.
        missing: rows that follow them.

    Raises:
        DataError: another process writes the file, or it holds answers to other rows.
    """

    def __init__(self, path: Path, rows: Sequence[int], batch_size: int) -> None:
        self.path, self._rows = path, list(rows)
        self._file = open_locked(path, f"{path}: another process is writing it; wait until it has ended")
        try:
            self.found = self._read(batch_size)
        except BaseException:
            self._file.close()
            raise

    @property
    def missing(self) -> list[int]:
        """Rows without an answer, in order."""
        return self._rows[len(self.found) :]

    def _read(self, batch_size: int) -> list[CaptionAnswer]:
        self._file.seek(0)
        content = self._file.read()
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                answer = CaptionAnswer(**json.loads(line))
            except (ValueError, TypeError, RecursionError):
                raise DataError(
                    f"{self.path}, line {number}: is not an answer of a captioning model; remove the file, and its "
                    "shard is captioned again"
                ) from None
            if number > len(self._rows) or answer.row != self._rows[number - 1]:
                raise DataError(
                    f"{self.path}, line {number}: is the answer to row {answer.row}, which is not next among the rows "
                    "that the stages before have kept; remove the file, and its shard is captioned again"
                )
            found.append(answer)
        whole = len(found) if len(found) == len(self._rows) else len(found) // batch_size * batch_size
        self._file.truncate(sum(map(len, lines[:whole])))
        return found[:whole]

    def __enter__(self) -> CaptionAnswers:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, answers: Iterable[CaptionAnswer]) -> None:
        """Append the answers to the next rows, and flush them to disk."""
        answers = list(answers)
        wanted = self._rows[len(self.found) : len(self.found) + len(answers)]
        assert [answer.row for answer in answers] == wanted, "answers come in the order of the rows"
        self._file.write("".join(answer.to_line() for answer in answers).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.found += answers
