#!/usr/bin/env python3
"""`pip install` with a line a minute while it works, and its own output only where it fails. The Makefile runs it.

    .venv/bin/python tools/pip_install.py ARGUMENTS OF PIP INSTALL

Standard library only: it runs in an environment that holds nothing yet.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

EVERY = 60.0
"""Seconds between two lines."""
WIDTH = 76
"""Characters of pip's last line that are shown."""
LAST_LINES = 30
"""Lines of pip's output shown after a failure."""


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; links count as themselves, files that vanish meanwhile not at all."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def install(words: list[str], folder: Path, every: float = EVERY) -> int:
    """Run a command and report on it.

    Args:
        words: the command.
        folder: whose size is reported.
        every: seconds between two lines.

    Returns:
        Its exit status.
    """
    began, lines, done = time.monotonic(), [""], threading.Event()

    def report() -> None:
        while not done.wait(every):
            minutes = (time.monotonic() - began) / 60
            size = size_of(folder) / 1e9
            if not done.is_set():
                print(f"    {minutes:.0f} min, {size:.1f} GB so far: {lines[-1].strip()[:WIDTH]}", flush=True)

    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    threading.Thread(target=report, daemon=True).start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                lines.append(line.rstrip("\n"))
        status = process.wait()
    except KeyboardInterrupt:  # the terminal has sent it to pip, too
        process.wait()
        return 130
    finally:
        done.set()
    if status:
        print("\n".join(lines[-LAST_LINES:]), file=sys.stderr)
    return status


def main() -> int:
    """Install what the command line names; returns pip's exit status."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off"]
    return install([*pip, *sys.argv[1:]], Path(sys.prefix))


if __name__ == "__main__":
    sys.exit(main())
