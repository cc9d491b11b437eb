"""Prints the help pages of commands, and reads the command lines of their examples, all in one process.

It reads a JSON list of jobs from standard input, `{"command": [...], "columns": N}`, and writes what came of each:
`{"status", "out", "err", "torch"}`. A command is a script's path or a module's name, and its words. It is not run:
it ends where its flags have been read.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_eve.runtime.command_line import CommandParser

ROOT = Path(__file__).parents[1]


class FlagsRead(BaseException):
    """The flags of a command have been read without a mistake."""


class ReadingAlone:
    """Puts an end to a command behind its own reading of the flags."""

    def __init__(self) -> None:
        self.read = CommandParser.parse_args

    def __call__(
        self, parser: CommandParser, words: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        self.read(parser, words, namespace)
        raise FlagsRead


def run(command: Sequence[str]) -> int | str | None:
    """Start a command in this process; its exit status."""
    name, *words = command
    script = ROOT / name
    before, sys.argv = list(sys.path), [name, *words]
    try:
        if script.suffix == ".py":
            sys.path.insert(0, str(script.parent))
            runpy.run_path(str(script), run_name="__main__")
        else:
            sys.modules.pop(name, None)  # runpy warns of a module that another command imported
            runpy.run_module(name, run_name="__main__")
    except SystemExit as ended:
        return ended.code
    except FlagsRead:
        return 0
    finally:
        sys.path[:] = before
    return "it went on behind its flags"


def main() -> None:
    """Run the jobs."""
    jobs, found = json.load(sys.stdin), []
    reading = ReadingAlone()
    CommandParser.parse_args = lambda *given: reading(*given)  # type: ignore[method-assign]
    for job in jobs:
        os.environ["COLUMNS"] = str(job["columns"])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run(job["command"])
        found.append(
            {"status": status, "out": out.getvalue(), "err": err.getvalue(), "torch": "torch" in sys.modules}
        )
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
