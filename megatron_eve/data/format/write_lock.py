"""A lock on a dataset that is being written: two runs that write to one prefix would corrupt each other's files.

It is a lock (`file_lock.py`) on OUT_dataset.json.partial, which holds the name of the owner.
"""

from __future__ import annotations

import os
import socket
from datetime import datetime
from pathlib import Path
from types import TracebackType

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.file_lock import lock_file
from megatron_eve.data.format.manifest import MANIFEST, PARTIAL


class WriteLock:
    """Held by this process from construction until `release`. On a file system without flock it only prints a warning.

    Args:
        prefix: of the dataset; its folder must exist.

    Raises:
        DataError: another run writes the dataset.
    """

    def __init__(self, prefix: str) -> None:
        path = Path(prefix + MANIFEST + PARTIAL)
        file = lock_file(path)
        if file is None:
            holder = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            raise DataError(
                f"{prefix} is being written by {holder or 'another run'}: wait until it has ended, or choose another "
                "--output-prefix"
            )
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
