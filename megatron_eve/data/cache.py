"""Arrays that take a while to compute and are kept in `--data-cache-path`, where several runs may share them.

Nothing is locked. A file gets its name when it is whole, in one step, so a reader sees all of it or none; two
processes that compute the same array write the same bytes, and whoever comes last replaces the other's copy.
"""

from __future__ import annotations

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
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:  # not there; or damaged, and then numpy can raise almost anything: make it again
        pass
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.save(stream, build(), allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return np.load(path, mmap_mode="r", allow_pickle=False)
