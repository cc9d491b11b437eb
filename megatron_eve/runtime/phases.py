"""Prints the name and the duration of start-up phases that take longer than a second."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SILENT_SECONDS = 1.0


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Rank 0 prints `NAME ...` once the block has run for a second, and its duration at the end."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    started = time.monotonic()
    timer = threading.Timer(_SILENT_SECONDS, lambda: print(f"{name} ...", flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if (seconds := time.monotonic() - started) > _SILENT_SECONDS:
        print(f"{name}: {seconds:.1f} s", flush=True)
