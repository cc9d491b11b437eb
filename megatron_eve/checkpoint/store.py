"""The folder of a run's checkpoints on disk: naming, the latest one, removing old ones, free space.

    SAVE/iter_0000100/                       a complete checkpoint (it is renamed to this when complete)
    SAVE/iter_0000200.partial.../            an incomplete one: being written, or the writing was interrupted
    SAVE/latest_checkpointed_iteration.txt   the latest one's iteration

Inside, beside megatron-core's files: `config.yaml`, and `*.sha256` in the format of `sha256sum -c`, which each rank
writes for its own files (see `files.py`). Nothing here communicates with other ranks.
"""

from __future__ import annotations

import os
import re
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
from megatron_eve.checkpoint.lease import is_leased
from megatron_eve.config import TRACKER, CheckpointConfig

_PREFIX, _PARTIAL = "iter_", ".partial"
_ITERATION = re.compile(rf"{_PREFIX}(\d+)")
_MOST_LISTED = 12  # iterations that a message names
# A file that reserves disk space while tensors are written, so that the small files after them still fit.
_RESERVE, _RESERVE_BYTES = ".reserve", 64 << 20


class CheckpointStore:
    """The checkpoints of a run: opened by its folder or, for reading, by one checkpoint in it (`run/iter_0000100`).

    Attributes:
        root: the run's folder.
        chosen: iteration of the checkpoint that the path names; None if it names the run's folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.root, self.chosen = Path(path), iteration_of(path)
        if self.chosen is not None:
            self.root = Path(path).absolute().parent

    def folder(self, iteration: int) -> Path:
        """Path of a checkpoint, named as Megatron does."""
        return self.root / f"{_PREFIX}{iteration:07d}"

    def iterations(self) -> list[int]:
        """Iterations of the folders named `iter_NUMBER`, oldest first."""
        names = [path.name.removeprefix(_PREFIX) for path in self.root.glob(f"{_PREFIX}*")]
        return sorted(int(name) for name in names if name.isdigit())

    def latest(self) -> int | None:
        """Iteration of the latest checkpoint: the one that the path names, else the one that the tracker file names.

        Without a tracker file, which a copy may lack, it is the newest folder's; None if there is no checkpoint.

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

        Folders newer than the tracker's iteration are left out: their run was killed before it updated the tracker.
        Without a readable tracker file all folders are candidates. A checkpoint that the path names is the only one.
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
        """Rename `iter_*.replaced` back if the run was killed while it replaced that checkpoint."""
        for path in self.root.glob(f"{_PREFIX}*.replaced"):
            if not path.with_suffix("").exists():
                path.rename(path.with_suffix(""))

    def clear(self) -> None:
        """Remove incomplete folders that killed runs left while writing, replacing or removing checkpoints."""
        for kind in (f"{_PARTIAL}*", ".removed", ".replaced"):
            for path in self.root.glob(f"{_PREFIX}*{kind}"):
                shutil.rmtree(path, ignore_errors=True)

    def begin(self, iteration: int) -> Path:
        """Make a temporary folder for a checkpoint. Its name is unique, so that a stale writer cannot write into it.

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
        """Make a completely written folder the latest checkpoint. If killed in between, the one before stays latest.

        Raises:
            CheckpointError: a file has no checksum, so the rank that wrote it did not finish.
            OSError: the disk is full, or a file operation failed.
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
        if final.exists():  # it is damaged, not in the tracker, or out of date
            final.rename(replaced)
        try:
            partial.rename(final)
        except OSError:
            self.recover()
            raise
        self._write_tracker(iteration)
        shutil.rmtree(replaced, ignore_errors=True)

    def free_reserve(self, partial: Path) -> None:
        """Free the reserved disk space; called when the tensors are written."""
        (partial / _RESERVE).unlink(missing_ok=True)

    def abandon(self, partial: Path) -> None:
        """Remove a folder that could not be written completely."""
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
        """Remove old checkpoints; the latest always stays. One that cannot be removed is skipped.

        One that another process reads (`lease.py`) is left as it is, for the next call.

        Args:
            keep_last: number of newest checkpoints that stay; None keeps all.
            retain_interval: older checkpoints at multiples of this stay, too.
            weights_only: remove the optimizer state of those.

        Returns:
            A message for each checkpoint that was skipped.
        """
        latest = self.latest()
        problems: list[str] = []
        if latest is None or keep_last is None:
            return problems
        older = [iteration for iteration in self.iterations() if iteration <= latest][:-keep_last]
        for iteration in older:
            folder = self.folder(iteration)
            try:
                if is_leased(folder):
                    continue
                if not (retain_interval and iteration % retain_interval == 0):
                    to_remove = folder.with_name(folder.name + ".removed")
                    # Renamed first: a killed run must leave no half-removed folder under the old name.
                    folder.rename(to_remove)
                    if is_leased(to_remove):  # taken since it was looked for
                        to_remove.rename(folder)
                        continue
                    shutil.rmtree(to_remove, ignore_errors=True)
                elif weights_only:
                    drop_optimizer(folder)
            except Exception as error:  # reading a damaged index, which is a pickle, raises almost anything
                problems.append(f"{folder} could not be removed or reduced ({type(error).__name__}: {error})")
        return problems

    @property
    def free(self) -> str:
        """Free space of the disk as text; raises nothing."""
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
        """The error if the disk cannot hold one checkpoint more than are kept; None if it can.

        Args:
            size: bytes of a checkpoint.
            kept: number of checkpoints that are kept.
        """
        free = self._free()
        held = sum(path.stat().st_size for path in self.root.glob(f"{_PREFIX}*/*") if path.is_file())
        if free + held >= size * (kept + 1):
            return None
        return (
            f"{self.root}: {self.free} are free there, and {kept + 1} checkpoints of about "
            f"{size / 1e9:,.1f} GB must fit; free some space, choose another --save, or keep fewer (--keep-last)"
        )


def iteration_of(path: str | Path) -> int | None:
    """Iteration of the checkpoint folder that a path names; None if it names no existing checkpoint folder."""
    named = _ITERATION.fullmatch(Path(path).absolute().name)
    return int(named[1]) if named and Path(path).is_dir() else None


def named_checkpoint(path: str | Path, step: int | None, flag: str) -> Path:
    """The folder that a flag and `--ckpt-step` name together: of a run, or of one of its checkpoints.

    Args:
        path: a run's folder, one checkpoint in it (`run/iter_0000100`), or a folder in Hugging Face layout.
        step: of `--ckpt-step`; None without it.
        flag: that the path was given with.

    Returns:
        The checkpoint's folder if an iteration is named; else the path as it is.

    Raises:
        CheckpointError: the run has no such iteration, and which it has.
    """
    there, named = Path(path), _ITERATION.fullmatch(Path(path).absolute().name)
    if named is None and step is None:
        return there
    if named is not None:
        if step not in (None, int(named[1])):
            raise CheckpointError(
                f"--ckpt-step {step}: {flag} {path} is iteration {int(named[1])} of its run; leave one of them out"
            )
        if there.exists():
            return there
    root, number = (there, step) if named is None else (there.absolute().parent, int(named[1]))
    asked = f"{flag} {path}" if step is None else f"--ckpt-step {step}"
    if (root / "config.json").is_file() and not (root / TRACKER).is_file():
        raise CheckpointError(
            f"{asked}: {root} is a folder in Hugging Face layout, which has no iterations; leave --ckpt-step out"
        )
    found = CheckpointStore(root).iterations()
    if number in found:
        return CheckpointStore(root).folder(number)
    few = ", ".join(map(str, found[-_MOST_LISTED:]))
    more = f"the last {_MOST_LISTED} of {len(found)} are " if len(found) > _MOST_LISTED else "there are "
    raise CheckpointError(
        f"{asked}: {root} has no iteration {number}; {more + few if found else 'it has none'}"
    )


def path_to_resume(checkpoint: CheckpointConfig) -> Path | None:
    """What a run resumes from: `--load`, and of it the iteration `--ckpt-step`. None without `--load`.

    Raises:
        CheckpointError: see `named_checkpoint`.
    """
    return named_checkpoint(checkpoint.load, checkpoint.ckpt_step, "--load") if checkpoint.load else None


def path_of_pretrained(checkpoint: CheckpointConfig) -> Path | None:
    """Which weights a run starts from: `--pretrained-checkpoint`. `--ckpt-step` is about it if there is no `--load`.

    Raises:
        CheckpointError: see `named_checkpoint`.
    """
    if checkpoint.pretrained_checkpoint is None:
        return None
    step = None if checkpoint.load else checkpoint.ckpt_step
    return named_checkpoint(checkpoint.pretrained_checkpoint, step, "--pretrained-checkpoint")
