"""A bar on stderr while bytes are read or written for longer than a second: how many of how many."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

_SILENT_SECONDS = 1.0
_LINE_SECONDS = 30.0  # between two lines where stderr is no terminal: a log file is not for redrawing


class _Bar(tqdm):
    """tqdm's, without the thread that would watch it from then on, in a process that forks writers of checkpoints."""

    monitor_interval = 0


@contextmanager
def byte_progress(what: str, size: int) -> Iterator[Callable[[int], None]]:
    """Show on rank 0 how far something has come; gives the function that moves it on by so many bytes.

    Args:
        what: happens, in a few words.
        size: bytes in all.
    """
    if os.environ.get("RANK", "0") != "0":
        yield lambda count: None
    elif sys.stderr.isatty():
        # Left to itself tqdm takes a terminal that says it has no columns, as those of containers may, by its word.
        columns, rows = shutil.get_terminal_size()
        with _Bar(
            total=size, desc=what, unit="B", unit_scale=True, unit_divisor=1024,
            delay=_SILENT_SECONDS, ncols=columns, nrows=rows,
        ) as bar:  # fmt: skip
            yield lambda count: bar.update(count) and None
    else:
        yield _lines(what, size)


def _lines(what: str, size: int) -> Callable[[int], None]:
    done, last_printed = 0, time.monotonic()

    def move(count: int) -> None:
        nonlocal done, last_printed
        done += count
        if time.monotonic() - last_printed > _LINE_SECONDS:
            last_printed = time.monotonic()
            print(f"{what}: {done / max(size, 1):.0%} of {size / 1e9:,.1f} GB", file=sys.stderr, flush=True)

    return move
