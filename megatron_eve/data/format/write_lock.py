"""A lock on a dataset that is being written: two runs that write to one prefix would corrupt each other's files.

It is an flock on OUT_dataset.json.partial, which holds the name of the owner. The operating system releases it when the
process ends, also when it is killed. It works between nodes if the shared file system supports flock across nodes: NFS
and GPFS do, and Lustre does if mounted with `flock`.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.manifest import MANIFEST, PARTIAL


class WriteLock:
    """Held by this process from construction until `release`. On a file system without flock it only prints a warning.

    Args:
        prefix: of the dataset; its folder must exist.

    Raises:
        DataError: another run writes the dataset.
    """

    def __init__(self, prefix: str) -> None:
        self._path = Path(prefix + MANIFEST + PARTIAL)
        file = self._open(prefix)
        while not self._is_at_path(file):  # the other run ended in between and removed the file
            file.close()
            file = self._open(prefix)
        job = f" (Slurm job {os.environ['SLURM_JOB_ID']})" if "SLURM_JOB_ID" in os.environ else ""
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        file.truncate(0)
        file.write(f"PID {os.getpid()} on {socket.gethostname()}{job} since {since}")
        file.flush()
        self._file = file

    @property
    def held(self) -> bool:
        """True until `release` is called."""
        return not self._file.closed

    def release(self) -> None:
        """Release the lock."""
        self._file.close()

    def __enter__(self) -> WriteLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _open(self, prefix: str) -> IO[str]:
        """Open the file and lock it, if its file system supports locks."""
        file = self._path.open("a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            holder = self._path.read_text(encoding="utf-8", errors="replace") if self._path.exists() else ""
            raise DataError(
                f"{prefix} is being written by {holder or 'another run'}: wait until it has ended, or choose another "
                "--output-prefix"
            ) from None
        except OSError as error:
            print(
                f"warning: {self._path} cannot be locked ({error.strerror}): let no other run write {prefix}",
                file=sys.stderr,
            )
        return file

    def _is_at_path(self, file: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False
