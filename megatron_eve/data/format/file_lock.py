"""Locks on files: an flock, which the operating system releases when the process ends, also when it is killed.

It works between nodes if the shared file system supports flock across nodes: NFS and GPFS do, and Lustre does if
mounted with `flock`.
"""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path
from typing import IO


def lock_file(path: Path, *, wait: bool = False, shared: bool = False) -> IO[str] | None:
    """Open a file, which is made if it is not there, and lock it. The one who holds the lock may remove the file.

    Args:
        path: of the file.
        wait: until others release it.
        shared: several may hold a lock of this kind.

    Returns:
        The file, locked until it is closed; None if another process holds the lock and this one does not wait. On a
        file system without flock the file is open and not locked, and a warning is printed.
    """
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, kind)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            _warn(path.parent, f"{path} cannot be locked ({error.strerror}): let no other run write there")
        if _is_at_path(file, path):
            return file
        file.close()  # its holder has removed it meanwhile


_warned: set[Path] = set()


def _warn(folder: Path, message: str) -> None:
    """Print a warning, once for each folder."""
    if folder not in _warned:
        _warned.add(folder)
        print(f"warning: {message}", file=sys.stderr)


def _is_at_path(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
