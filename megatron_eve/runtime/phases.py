"""Say what a run is doing where that takes longer than a second, so that nobody waits before a silent terminal."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SILENT_SECONDS = 1.0


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name what happens inside: after a second rank 0 says that it goes on, and at the end how long it took."""
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
