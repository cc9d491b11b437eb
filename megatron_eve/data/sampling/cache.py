"""Arrays that take a while to compute and are kept in `--data-cache-path`, where several runs may share them.

Nothing is locked. A file gets its name when it is whole, in one step, so a reader sees all of it or none. Of two
processes that compute the same array, the first one names its file and the other takes that: a file that somebody may
have mapped is never replaced, unless it is damaged.
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
    """An array from the cache, mapped read-only, or computed and put there.

    Args:
        folder: of the cache, made if it is not there; None keeps the array in memory.
        name: of the array, without an ending; says all that the array depends on.
        build: computes it.

    Raises:
        OSError: the folder cannot be written; names it.
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
            if known is None:  # what has the name is damaged
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
    """The array, or None if it is not there or damaged (and then numpy can raise almost anything)."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:
        return None
