"""The folder of a run's checkpoints on disk: what is whole, what is the latest, what is kept, what fits.

    SAVE/iter_0000100/                       a checkpoint, whole since it has this name
    SAVE/iter_0000200.partial.../            one that is being written, or whose writing was cut short
    SAVE/latest_checkpointed_iteration.txt   the latest one's iteration

Inside, beside megatron-core's files: `config.yaml` for people, and `*.sha256`, in the format of `sha256sum -c`, which
each rank writes for its own files; `files.py` knows them. Nothing here talks to other ranks.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from megatron_eve.checkpoint.compatibility import CheckpointError
from megatron_eve.checkpoint.files import (
    ALWAYS,
    checksums_of,
    drop_optimizer,
    shards_of,
    sync_to_disk,
    write_checksums,
)
from megatron_eve.config import TRACKER

_PREFIX, _PARTIAL = "iter_", ".partial"
# Held free while tensors are written, so that a disk they fill has room for the small files that come after them.
_RESERVE, _RESERVE_BYTES = ".reserve", 64 << 20


class CheckpointStore:
    """One run's folder, or, for reading, one checkpoint of it (`run/iter_0000100`).

    Attributes:
        root: the run's folder.
        chosen: the iteration of the checkpoint that the path names; None where it names the run's folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.root, self.chosen = Path(path), iteration_of(path)
        if self.chosen is not None:
            self.root = Path(path).absolute().parent

    def folder(self, iteration: int) -> Path:
        """Megatron's name for a checkpoint."""
        return self.root / f"{_PREFIX}{iteration:07d}"

    def iterations(self) -> list[int]:
        """Iterations of the folders that have a whole checkpoint's name, oldest first."""
        names = [path.name.removeprefix(_PREFIX) for path in self.root.glob(f"{_PREFIX}*")]
        return sorted(int(name) for name in names if name.isdigit())

    def latest(self) -> int | None:
        """The iteration that the tracker file names, or of the one checkpoint that was chosen.

        Without a tracker file, which a copy may have left behind, it is the newest folder's; None where there is none.

        Raises:
            CheckpointError: the tracker file does not hold a number.
        """
        if self.chosen is not None:
            return self.chosen
        tracker = self.root / TRACKER
        if not tracker.exists():
            return max(self.iterations(), default=None)
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if not text.isdigit():
            raise CheckpointError(
                f"{tracker}: holds {text[:40]!r}, not an iteration; write the number of a whole iter_ folder into it"
            )
        return int(text)

    def candidates(self) -> list[int]:
        """Checkpoints to resume from, best first: the one that the tracker names, then older ones.

        A folder newer than the tracker says belongs to a run that was killed before it named it: the one before it
        is taken, as if the kill had come a moment earlier. Without a tracker, or with one that cannot be read, all
        are. A checkpoint that was chosen is the only one.
        """
        if self.chosen is not None:
            return [self.chosen]
        try:
            latest = self.latest()
        except CheckpointError:
            return self.iterations()[::-1]
        if latest is None:
            return []
        return [latest, *(older for older in self.iterations()[::-1] if older < latest)]

    def recover(self) -> None:
        """Give a checkpoint its name back that a kill left between two names, while it was being replaced."""
        for path in self.root.glob(f"{_PREFIX}*.replaced"):
            if not path.with_suffix("").exists():
                path.rename(path.with_suffix(""))

    def clear(self) -> None:
        """Remove what kills have left of folders that were being written, replaced or removed."""
        for kind in (f"{_PARTIAL}*", ".removed", ".replaced"):
            for path in self.root.glob(f"{_PREFIX}*{kind}"):
                shutil.rmtree(path, ignore_errors=True)

    def begin(self, iteration: int) -> Path:
        """A new folder to write a checkpoint into. Its name is its own: a writer that outlived a kill cannot reach it.

        Raises:
            OSError: the folder cannot be made, or the disk is full.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{self.folder(iteration).name}{_PARTIAL}.", dir=self.root))
        partial.chmod(0o755)
        try:
            with (partial / _RESERVE).open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, _RESERVE_BYTES)
        except OSError:
            self.abandon(partial)
            raise
        return partial

    def publish(self, partial: Path, iteration: int) -> None:
        """Make a folder that was written whole the latest checkpoint. A kill on the way leaves the one before it so.

        Raises:
            CheckpointError: a file lacks its checksum, so the rank that wrote it did not finish.
            OSError: the disk is full, or worse.
        """
        final = self.folder(iteration)
        write_checksums(partial, "run", [name for name in ALWAYS if (partial / name).exists()])
        lacking = set(shards_of(partial)) - set(checksums_of(partial))
        if lacking:
            raise CheckpointError(f"{partial}: {sorted(lacking)[0]} has no checksum")
        for path in [*partial.rglob("*"), partial]:
            sync_to_disk(path)
        replaced = final.with_name(final.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():  # damaged; or nobody names it yet; or it is out of date (see `recover`)
            final.rename(replaced)
        try:
            partial.rename(final)
        except OSError:
            self.recover()
            raise
        self._write_tracker(iteration)
        shutil.rmtree(replaced, ignore_errors=True)

    def free_reserve(self, partial: Path) -> None:
        """Give the reserve back, when the tensors are written."""
        (partial / _RESERVE).unlink(missing_ok=True)

    def abandon(self, partial: Path) -> None:
        """Remove what could not be written whole."""
        shutil.rmtree(partial, ignore_errors=True)

    def _write_tracker(self, iteration: int) -> None:
        temporary = self.root / f".{TRACKER}.partial"
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(str(iteration))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.root / TRACKER)
        sync_to_disk(self.root)

    def prune(self, keep_last: int | None, retain_interval: int | None, weights_only: bool) -> list[str]:
        """Remove what need not be kept; the latest checkpoint always stays. What cannot be removed is passed over.

        Args:
            keep_last: the newest so many stay as they are; None keeps all.
            retain_interval: of the older ones, those at multiples of this stay too.
            weights_only: those lose their optimizer state.

        Returns:
            What was passed over, and why.
        """
        latest = self.latest()
        problems: list[str] = []
        if latest is None or keep_last is None:
            return problems
        older = [iteration for iteration in self.iterations() if iteration <= latest][:-keep_last]
        for iteration in older:
            folder = self.folder(iteration)
            try:
                if not (retain_interval and iteration % retain_interval == 0):
                    to_remove = folder.with_name(folder.name + ".removed")
                    folder.rename(to_remove)  # so that a kill leaves no half of it under a whole one's name
                    shutil.rmtree(to_remove, ignore_errors=True)
                elif weights_only:
                    drop_optimizer(folder)
            except Exception as error:  # of a damaged index, which is a pickle, almost any
                problems.append(f"{folder} could not be removed or reduced ({type(error).__name__}: {error})")
        return problems

    @property
    def free(self) -> str:
        """How much room the disk has, for people; nothing is raised."""
        try:
            return f"{self._free() / 1e9:,.1f} GB"
        except OSError as error:
            return f"unknown bytes ({error.strerror})"

    def _free(self) -> int:
        there = self.root
        while not there.exists():
            there = there.parent
        return shutil.disk_usage(there).free

    def space_problem(self, size: int, kept: int) -> str | None:
        """What is wrong if the disk has no room for one checkpoint more than are kept; None if it has.

        Args:
            size: bytes of a checkpoint.
            kept: how many are kept.
        """
        free = self._free()
        held = sum(path.stat().st_size for path in self.root.glob(f"{_PREFIX}*/*") if path.is_file())
        if free + held >= size * (kept + 1):
            return None
        return (
            f"{self.root}: {self.free} are free there, and {kept + 1} checkpoints of about "
            f"{size / 1e9:,.1f} GB must fit; make room, choose another --save, or keep fewer (--keep-last)"
        )


def iteration_of(path: str | Path) -> int | None:
    """The iteration of the checkpoint folder that a path names; None where it names no checkpoint that is there."""
    folder = Path(path)
    number = folder.absolute().name.removeprefix(_PREFIX)
    named = folder.absolute().name.startswith(_PREFIX) and number.isdigit()
    return int(number) if named and folder.is_dir() else None
