"""Files of a run's numbers: lines of JSON and TensorBoard's events. A failed write does not end the run."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TextIO

_LONGEST_LINE = 1 << 20  # bytes of a line in losses.jsonl or valid_losses.jsonl


class _OutputFile:
    """An output file of a run. A failed write does not end the run; it is reported once.

    Args:
        path: of the file or folder.
    """

    def __init__(self, path: str | Path) -> None:
        self._path, self._failed = path, False

    def _try(self, write: Callable[[], Any]) -> bool:
        try:
            write()
        except OSError as error:
            if not self._failed:
                reason = error.strerror or error
                print(f" {self._path} could not be written ({reason}); the run goes on", flush=True)
            self._failed = True
            return False
        return True


class JsonLinesFile(_OutputFile):
    """A file of JSON lines, opened for appending; an incomplete last line (after a kill or a full disk) is cut off."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file: TextIO | None = None
        self._try(self._open)

    def add(self, record: dict[str, Any]) -> None:
        """Append a line. If it cannot be written completely, the file is reopened for the next line."""
        if not self._try(lambda: self._write(json_line(record))):
            self.close()

    def close(self) -> None:
        """Close the file."""
        stream, self._file = self._file, None
        if stream:
            self._try(stream.close)

    def _open(self) -> None:
        path = Path(self._path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open("rb") as stream:
                begin = max(0, stream.seek(0, os.SEEK_END) - _LONGEST_LINE)
                stream.seek(begin)
                os.truncate(path, begin + stream.read(_LONGEST_LINE).rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8")

    def _write(self, line: str) -> None:
        if self._file is None:
            self._open()
        assert self._file is not None
        self._file.write(line)
        self._file.flush()


class TensorBoardWriter(_OutputFile):
    """TensorBoard's event file. After a failed write nothing more is written.

    Args:
        folder: of the event files.
        start: TensorBoard drops what earlier files have of iterations after this one; None drops nothing.

    Not torch's SummaryWriter, whose writer thread ends with a traceback when the disk is full.
    """

    def __init__(self, folder: str, start: int | None) -> None:
        super().__init__(folder)
        self._file: BinaryIO | None = None
        if not self._try(lambda: self._begin(start)):
            self.close()

    def add(self, values: dict[str, float], iteration: int) -> None:
        """Add a value to each of these scalars."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = Summary(
            value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        )
        if self._file and not self._try(lambda: self._write({"step": iteration, "summary": points})):
            self.close()

    def close(self) -> None:
        """Close the file."""
        stream, self._file = self._file, None
        if stream:
            self._try(stream.close)

    def _begin(self, start: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        folder = Path(self._path)
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files of this name, sorted by name; host and PID separate runs that start at the same time.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._write({"file_version": "brain.Event:2"})
        if start is not None:  # TensorBoard drops earlier events of this iteration and of later ones
            self._write({"step": start + 1, "session_log": SessionLog(status=SessionLog.START)})

    def _write(self, fields: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        assert self._file is not None
        RecordWriter(self._file).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()


def json_line(record: dict[str, Any]) -> str:
    """A record as a line of JSON; NaN and infinity, which JSON lacks, become null."""

    def clean(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({name: clean(value) for name, value in record.items()}, allow_nan=False) + "\n"
