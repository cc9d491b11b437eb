"""A lock on the folder of `--save`: two runs in one folder would mix their losses and remove each other's checkpoints.

    SAVE/lock             the process that writes there, as JSON; touched every 30 s, and removed when the run ends
    SAVE/lock.takeover    held briefly by a process that replaces the lock of a killed run

Both are made with `link`, which is atomic on NFS, too. Only `save_lock` needs torch, to inform all ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from megatron_eve.runtime.errors import UserError

LOCK = "lock"
HEARTBEAT_SECONDS = 30.0
# The lock of a run on another host is stale at this age: four heartbeats were missed.
STALE_SECONDS = 120.0
# How long to retry while another process holds the takeover lock.
_TAKEOVER_SECONDS = 10.0


class FolderInUseError(UserError):
    """Another running process writes into the folder of `--save`."""


@dataclass(frozen=True)
class _Holder:
    """A process that holds a lock.

    Attributes:
        pid, host, since: process number, host name and start of the lock, for messages.
        started: start of the process, in clock ticks since boot.
        system: boot id and PID namespace of the process; None if unknown.
        slurm_job_id: the Slurm job of the process, if any.
        token: a unique id of this lock.
    """

    pid: int
    host: str
    since: str
    started: int | None
    system: str | None
    slurm_job_id: str | None
    token: str

    @property
    def is_of_this_job(self) -> bool:
        """True if it belongs to this process's Slurm job."""
        return self.slurm_job_id is not None and self.slurm_job_id == os.environ.get("SLURM_JOB_ID")


@dataclass(frozen=True)
class _LockFile:
    """The contents and time of a lock file; `holder` is None if it is not in the format of this module."""

    text: str
    holder: _Holder | None
    written: float

    @property
    def _is_of_this_system(self) -> bool:
        return (
            self.holder is not None
            and self.holder.system is not None
            and self.holder.system == _boot_and_pid_namespace()
        )

    @property
    def is_of_this_process(self) -> bool:
        """True if this process itself holds the lock."""
        return self._is_of_this_system and self.holder is not None and self.holder.pid == os.getpid()

    def is_alive(self, now: float) -> bool:
        """True if its process may still be running. If unknown, True until two minutes after its last heartbeat."""
        if self.holder and self._is_of_this_system:
            started = _process_start(self.holder.pid)
            return started is not None and started == self.holder.started
        if self.holder and self.holder.is_of_this_job:
            return False  # a requeued job no longer runs on its former nodes
        return now - self.written <= STALE_SECONDS

    def in_use_message(self, folder: Path, now: float) -> str:
        """The error message for another process that wants the folder."""
        who = "an unknown process"
        if self.holder:
            job = f" (Slurm job {self.holder.slurm_job_id})" if self.holder.slurm_job_id else ""
            who = f"PID {self.holder.pid} on {self.holder.host}{job} since {self.holder.since}"
        message = f"--save {folder}: in use by {who}; end that run, or choose another folder"
        if not self._is_of_this_system:
            message += (
                f" (its last heartbeat was {max(0.0, now - self.written):.0f} s ago; if it is gone, try again "
                f"{STALE_SECONDS:.0f} s after that)"
            )
        return message


class SaveLock:
    """The lock of a folder, held by this process from construction until `release`.

    Args:
        folder: of `--save`; made if it does not exist.

    Raises:
        FolderInUseError: another running process holds it.
        OSError: the lock cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._path = self._folder / LOCK
        self._text = json.dumps(asdict(_this_process())) + "\n"
        self._released = threading.Event()
        self._folder.mkdir(parents=True, exist_ok=True)
        own = self._folder / f".{LOCK}.{uuid.uuid4().hex}"
        try:
            own.write_text(self._text, encoding="utf-8")
            given_up = time.monotonic() + _TAKEOVER_SECONDS
            while not self._try_acquire(own, last_try=time.monotonic() > given_up):
                time.sleep(0.05)
        finally:
            with contextlib.suppress(OSError):
                own.unlink()
        threading.Thread(target=self._heartbeat, name="save lock", daemon=True).start()

    def release(self) -> None:
        """Remove the lock."""
        self._released.set()
        with contextlib.suppress(OSError):
            if self._path.read_text(encoding="utf-8") == self._text:
                self._path.unlink()

    def _try_acquire(self, own: Path, last_try: bool) -> bool:
        """Make the lock, or replace a stale one; False if it changed meanwhile and the caller should try again."""
        if _link(own, self._path):
            return True
        now = own.stat().st_mtime  # by the file server's clock, which also dates the lock
        lock_file = _read(self._path)
        if lock_file is None:
            return False
        if lock_file.is_alive(now):
            raise FolderInUseError(lock_file.in_use_message(self._folder, now))
        # Only the holder of this second lock may replace a stale lock, so that one of two processes wins.
        takeover = self._path.with_name(f"{LOCK}.takeover")
        if not _link(own, takeover):
            other = _read(takeover)
            if other and not other.is_alive(now):
                takeover.unlink(missing_ok=True)
            elif other and last_try:
                raise FolderInUseError(other.in_use_message(self._folder, now))
            return False
        try:
            again = _read(self._path)
            if again is None or again.text != lock_file.text or again.is_alive(now):
                return False
            own.replace(self._path)
            return True
        finally:
            takeover.unlink(missing_ok=True)

    def _heartbeat(self) -> None:
        """Touch the lock at each interval until it is released or another process has replaced it."""
        while not self._released.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                if self._path.read_text(encoding="utf-8") == self._text:
                    os.utime(self._path)
                elif not self._released.is_set():
                    print(
                        f"warning: {self._path} is another run's now, which may write into {self._folder} too: "
                        "end one of the two",
                        flush=True,
                    )
                    return


@contextlib.contextmanager
def save_lock(folder: str | None) -> Iterator[None]:
    """Hold the lock of `--save` during a run, on rank 0. Collective.

    Args:
        folder: the same on all ranks; None, for a run that saves nothing, takes no lock.

    Raises:
        FolderInUseError: another running process writes there; the same on every rank.
    """
    if folder is None:
        yield
        return
    import torch

    lock: SaveLock | None = None
    problem: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            lock = SaveLock(folder)
        except FolderInUseError as error:
            problem = [str(error)]
        except OSError as error:  # such as a full disk, which must not end the run
            print(
                f"warning: {folder} could not be locked ({error.strerror or error}): take care that no other run "
                "writes there",
                flush=True,
            )
    torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise FolderInUseError(problem[0])
    try:
        yield
    finally:
        if lock:
            lock.release()


def in_use(folder: str | Path) -> str | None:
    """The error message if another running process holds a folder's lock, else None. Takes no lock.

    Processes of this Slurm job do not count. A lock that cannot be read counts as none; `save_lock` checks again.
    """
    try:
        lock_file = _read(Path(folder) / LOCK)
    except OSError:
        return None
    now = time.time()
    if lock_file is None or not lock_file.is_alive(now):
        return None
    if lock_file.holder and (lock_file.holder.is_of_this_job or lock_file.is_of_this_process):
        return None
    return lock_file.in_use_message(Path(folder), now)


def _read(path: Path) -> _LockFile | None:
    """Read a lock file; None if there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        written = path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        return _LockFile(text, _Holder(**json.loads(text)), written)
    except (ValueError, TypeError):
        return _LockFile(text, None, written)


def _link(own: Path, name: Path) -> bool:
    """Give a file a second name (hard link); False if the name exists already."""
    try:
        os.link(own, name)
    except FileExistsError:
        return own.stat().st_nlink > 1  # on NFS the link may have been made although the reply was lost
    return True


def _this_process() -> _Holder:
    return _Holder(
        pid=os.getpid(),
        host=socket.gethostname(),
        since=datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        started=_process_start(os.getpid()),
        system=_boot_and_pid_namespace(),
        slurm_job_id=os.environ.get("SLURM_JOB_ID"),
        token=uuid.uuid4().hex,
    )


def _boot_and_pid_namespace() -> str | None:
    """Boot id and PID namespace (a container has its own) of this process; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process_start(pid: int) -> int | None:
    """Start of a process on this machine, in clock ticks since boot; None if it is gone, or a zombie."""
    try:
        # The second field is the name, in parentheses, which may hold spaces and parentheses.
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
