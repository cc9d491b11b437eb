"""A progress bar on stderr, in bytes, for reading and writing that takes longer than a second."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

_SILENT_SECONDS = 1.0
_LINE_SECONDS = 30.0  # between two lines where stderr is a log file, which cannot redraw a bar


class _Bar(tqdm):
    """tqdm's bar without its monitor thread: this process forks checkpoint writers, which must not inherit it."""

    monitor_interval = 0


@contextmanager
def byte_progress(what: str, size: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on rank 0; yields the function that advances it by a number of bytes.

    Args:
        what: label of the bar, a few words.
        size: total bytes.
    """
    if os.environ.get("RANK", "0") != "0":
        yield lambda count: None
    elif sys.stderr.isatty():
        # Given explicitly: terminals of containers may report 0 columns, which tqdm by itself would use.
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
