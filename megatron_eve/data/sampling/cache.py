"""Cache on disk (`--data-cache-path`) for arrays that are slow to compute; several runs may share it.

There are no locks. A file is written under a temporary name and linked to its final name when complete, so readers see
a complete file or none. If two processes compute the same array, the first to link its file wins and the other reads
that one: a file that another process may have mapped is never replaced, unless it is damaged.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def cached_array(folder: str | None, name: str, build: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """Read an array from the cache, memory-mapped read-only, or compute and store it.

    Args:
        folder: cache folder, created if missing; None computes the array and keeps it in memory.
        name: file name without suffix; must identify everything that the array depends on.
        build: computes the array.

    Raises:
        OSError: the folder cannot be written; the message names it.
    """
    if folder is None:
        return build()
    path = Path(folder) / f"{name}.npy"
    known = _load(path)
    if known is not None:
        return known
    array = build()
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as stream:
                np.save(stream, array, allow_pickle=False)
                stream.flush()
                os.fsync(stream.fileno())
            Path(temporary).chmod(0o644)
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
            known = _load(path)
            if known is None:  # the file under this name is damaged
                Path(temporary).replace(path)
                known = np.load(path, mmap_mode="r", allow_pickle=False)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            f"--data-cache-path {folder}: cannot be written ({error}); choose another folder"
        ) from error
    return known


def _load(path: Path) -> NDArray[Any] | None:
    """The array, or None if the file is missing or damaged (numpy raises many kinds of errors then)."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:
        return None
