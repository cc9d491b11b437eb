"""Leases: files in a checkpoint's folder that keep `--keep-last` of a training run from removing it while it is read.

    SAVE/iter_0000100/lease-HOST-PID.json    of a process that reads the checkpoint: touched every minute, then removed
    SAVE/iter_0000100/lease-slurm-JOB.json   of an evaluation that waits for its nodes or runs (slurm/launch.sh)

A lease of a process that died expires five minutes after it was touched last. Ages are differences between times of
files in one folder, so that the clocks of the nodes need not agree. A lease is no part of a checkpoint, and no file of
checksums lists it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

RENEWAL_SECONDS = 60.0
EXPIRY_SECONDS = 300.0
_PREFIX = "lease-"


def is_lease(name: str) -> bool:
    """Does a file of a checkpoint's folder have the name of a lease, or of the file that tells the time?"""
    return name.startswith(_PREFIX)


@contextlib.contextmanager
def checkpoint_lease(folder: Path) -> Iterator[None]:
    """Keep a checkpoint from being removed by the run that wrote it, as long as this process reads it.

    A folder that cannot be written, such as a copy for reading alone, gets no lease: one warning says so.

    Args:
        folder: of one checkpoint (`run/iter_0000100`).
    """
    if not folder.is_dir():  # the opening of the checkpoint says so
        yield
        return
    path = folder / f"{_PREFIX}{socket.gethostname()}-{os.getpid()}.json"
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
    try:
        path.write_text(json.dumps(holder) + "\n", encoding="utf-8")
    except OSError as error:
        print(
            f"warning: {folder} gets no lease ({error.strerror}): a run that saves there with --keep-last may remove "
            "the checkpoint while it is read",
            flush=True,
        )
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, ended), name="checkpoint lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            path.unlink()


def is_leased(folder: Path) -> bool:
    """Has a checkpoint's folder a lease that has not expired?

    Raises:
        OSError: the folder has leases and cannot be written, so that their age is unknown.
    """
    leases = list(folder.glob(f"{_PREFIX}*.json"))
    if not leases:
        return False
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{_PREFIX}clock.") as clock:
        clock.write(b"\n")  # so that the file server dates it
        clock.flush()
        now = os.stat(clock.name).st_mtime
    return any(now - written < EXPIRY_SECONDS for written in map(_written, leases) if written is not None)


def _written(lease: Path) -> float | None:
    try:
        return lease.stat().st_mtime
    except FileNotFoundError:  # its process ended just now
        return None


def _renew(path: Path, ended: threading.Event) -> None:
    while not ended.wait(RENEWAL_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
