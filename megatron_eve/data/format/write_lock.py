"""A lock on a dataset that is being written: two runs that write to one prefix would mix their bytes in one file.

It is an flock on OUT_dataset.json.partial, which says who holds it. The kernel lets go of it when the process ends,
however it ends, so a run that was killed is in nobody's way. Between nodes it holds where the shared file system keeps
flocks for all of them: NFS and GPFS do, Lustre where it is mounted with `flock`.
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
    """Held by this process from when it is made until `release`. A file system without flocks gives a warning.

    Args:
        prefix: of the dataset; its folder is there.

    Raises:
        DataError: another run writes the dataset.
    """

    def __init__(self, prefix: str) -> None:
        self._path = Path(prefix + MANIFEST + PARTIAL)
        file = self._open(prefix)
        while not self._is_at_path(file):  # the other run ended in between, and the file went with it
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
        """Whether `release` has yet to be called."""
        return not self._file.closed

    def release(self) -> None:
        """Let others write the dataset."""
        self._file.close()

    def __enter__(self) -> WriteLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _open(self, prefix: str) -> IO[str]:
        """The file, locked unless its file system cannot do that."""
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
