"""Markdown tables of the benchmarks, with a description of the machine. Not a benchmark."""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from megatron_eve.runtime.accelerator import accelerator

TableRow = Sequence[object]


PACKAGES = ("megatron-core", "transformer-engine", "flash-attn", "transformers", "nvidia-dali-cuda130")


@cache
def machine_rows() -> list[TableRow]:
    """Rows that describe the machine, the packages and the commit."""
    rows: list[TableRow] = [
        ("date", time.strftime("%Y-%m-%d")),
        ("commit", _commit()),
        ("device", accelerator().name),
        ("torch", torch.__version__),
    ]
    if accelerator().name == "cuda":
        properties = torch.cuda.get_device_properties(0)
        rows += [
            ("GPU", properties.name),
            ("memory, GB", f"{properties.total_memory / 1e9:.1f}"),
            ("CUDA", torch.version.cuda or ""),
            ("cuDNN", _cudnn()),
        ]
    for package in PACKAGES:
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return rows


def _cudnn() -> str:
    """The version that is loaded; torch refuses to say it where that is older than the one it was compiled against."""
    try:
        return str(torch.backends.cudnn.version() or "")
    except RuntimeError:
        return str(torch.backends.cudnn.version() or "")  # the first call has kept it before it compared


def _commit() -> str:
    words = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"


class Table:
    """A Markdown table that is printed row by row and written to OUT/title.md, with the machine below it.

    The file is rewritten after each row, so a later failure loses no measurement.
    """

    def __init__(self, title: str, header: Sequence[str], out: Path | None) -> None:
        self._title, self._header, self._out = title, header, out
        self._rows: list[TableRow] = []
        self._notes: list[str] = []
        self._failed: list[str] = []
        print(f"\n## {title}\n\n{_table(header, [])}", flush=True)

    def add(self, *row: object) -> None:
        """Add a row and print it immediately."""
        self._rows.append(row)
        print(_line(row), flush=True)
        self._write()

    def note(self, text: str) -> None:
        """Add a note below the table."""
        self._notes.append(text)
        self._write()

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Context of a case that may fail: the failure is noted, and the other cases continue."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self._failed.append(name)
            self.note(f"Failed, {name}: {type(error).__name__}: {str(error).splitlines()[0][:300]}")

    def close(self) -> list[str]:
        """Print the notes; returns the names of the cases that failed."""
        print("".join(f"\n{note}\n" for note in self._notes), flush=True)
        return self._failed

    def _write(self) -> None:
        if self._out is None:
            return
        self._out.mkdir(parents=True, exist_ok=True)
        name = "-".join(self._title.lower().replace(",", "").split())
        parts = [f"## {self._title}", _table(self._header, self._rows), *self._notes]
        parts.append(_table(("machine", ""), machine_rows()))
        (self._out / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def exit_if_failed(failed: Sequence[str]) -> None:
    """Exit with status 1 if any case failed."""
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _line(row: TableRow) -> str:
    return "| " + " | ".join(map(str, row)) + " |"


def _table(header: Sequence[str], rows: Sequence[TableRow]) -> str:
    return "\n".join([_line(header), "|" + "---|" * len(header), *map(_line, rows)])
