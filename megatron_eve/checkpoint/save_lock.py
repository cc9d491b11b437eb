"""A lock on the folder of `--save`: two runs that write there mix their losses and remove each other's checkpoints.

    SAVE/lock             who writes there, as JSON; its time is set anew every half minute, and it goes with the run
    SAVE/lock.takeover    held for a moment by the process that replaces the lock of a run that was killed

Both are made by `link`, which takes a name once even on NFS. Nothing here needs torch, but for telling all ranks.
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
# The lock of a run on another host is stale when it is older: four heartbeats were missed.
STALE_SECONDS = 120.0
# For which another process may take over before its lock is asked about again.
_TAKEOVER_SECONDS = 10.0


class FolderInUseError(UserError):
    """Another run, which is alive, writes into the folder of `--save`."""


@dataclass(frozen=True)
class _Holder:
    """A process that holds a lock.

    Attributes:
        pid, host, since: for people, and to ask whether it lives.
        started: clock ticks from the start of the system to that of the process.
        system: the start of the system and the namespace in which the process has its number; None if unknown.
        slurm_job_id: the job it belongs to.
        token: tells this lock from all others.
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
        """Is it a process of the Slurm job that this process belongs to?"""
        return self.slurm_job_id is not None and self.slurm_job_id == os.environ.get("SLURM_JOB_ID")


@dataclass(frozen=True)
class _LockFile:
    """A lock file as it was read; `holder` is None if it does not hold what this module writes."""

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
        """Does this process itself hold it?"""
        return self._is_of_this_system and self.holder is not None and self.holder.pid == os.getpid()

    def is_alive(self, now: float) -> bool:
        """May its process still write? In doubt it may, until two minutes after its last heartbeat."""
        if self.holder and self._is_of_this_system:
            started = _process_start(self.holder.pid)
            return started is not None and started == self.holder.started
        if self.holder and self.holder.is_of_this_job:
            return False  # a job that is started again has left its former nodes
        return now - self.written <= STALE_SECONDS

    def in_use_message(self, folder: Path, now: float) -> str:
        """What to tell who wants the folder too."""
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
    """The lock of a folder, held by this process from when it is made until `release`.

    Args:
        folder: of `--save`; made if it is not there.

    Raises:
        FolderInUseError: another run, which is alive, holds it.
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
        """Let others have the folder."""
        self._released.set()
        with contextlib.suppress(OSError):
            if self._path.read_text(encoding="utf-8") == self._text:
                self._path.unlink()

    def _try_acquire(self, own: Path, last_try: bool) -> bool:
        """Make the lock, or replace a stale one; False if it changed meanwhile, so that it is to be tried again."""
        if _link(own, self._path):
            return True
        now = own.stat().st_mtime  # by the clock of the file server, which dates the lock too
        found = _read(self._path)
        if found is None:
            return False
        if found.is_alive(now):
            raise FolderInUseError(found.in_use_message(self._folder, now))
        # Only who holds this may replace a stale lock, so that of two that find it stale one wins.
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
            if again is None or again.text != found.text or again.is_alive(now):
                return False
            own.replace(self._path)
            return True
        finally:
            takeover.unlink(missing_ok=True)

    def _heartbeat(self) -> None:
        """Keep the lock young, until it is released or another process has it."""
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
    """Hold the lock of `--save` for the length of a run, on the first rank. Collective.

    Args:
        folder: the same on all ranks; None, for a run that saves nothing, does nothing.

    Raises:
        FolderInUseError: another run, which is alive, writes there; the same on every rank.
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
        except OSError as error:  # a full disk, say, which must not take the run
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
    """A sentence that says which other run writes into a folder, if one that is alive does. Takes nothing.

    Runs of this Slurm job are not another run, and a lock that cannot be read is none: `save_lock` looks again.
    """
    try:
        found = _read(Path(folder) / LOCK)
    except OSError:
        return None
    now = time.time()
    if found is None or not found.is_alive(now):
        return None
    if found.holder and (found.holder.is_of_this_job or found.is_of_this_process):
        return None
    return found.in_use_message(Path(folder), now)


def _read(path: Path) -> _LockFile | None:
    """A lock file; None if there is none."""
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
    """Give a file a second name; False if the name is taken."""
    try:
        os.link(own, name)
    except FileExistsError:
        return (
            own.stat().st_nlink > 1
        )  # NFS may have done it the first time it was asked, and lost the answer
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
    """What tells this boot of this machine, and this namespace of process numbers (a container's), from others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process_start(pid: int) -> int | None:
    """When a process of this system started, in clock ticks; None if it is gone, or has ended and nobody took note."""
    try:
        # The second field is the name, in parentheses, which may hold spaces and parentheses.
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
