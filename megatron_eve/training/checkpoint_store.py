"""The folder of a run's checkpoints on disk: what is whole, what is the latest, what is kept, what fits.

    SAVE/iter_0000100/                       a checkpoint, whole since it has this name
    SAVE/iter_0000200.partial.../            one that is being written, or whose writing was cut short
    SAVE/latest_checkpointed_iteration.txt   the latest one's iteration

Inside, beside megatron-core's files: `config.yaml` for people, and `*.sha256`, in the format of `sha256sum -c`, which
each rank writes for its own files. Nothing here talks to other ranks.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from megatron_eve.config import TRACKER, RunConfig
from megatron_eve.training.compatibility import CheckpointError

_PREFIX, _PARTIAL, _SUMS = "iter_", ".partial", ".sha256"
_ALWAYS = ("metadata.json", "common.pt", ".metadata", "config.yaml")
# Files of optimizer state, which are written apart from the weights' (megatron-core's `separation_hint`).
OPTIMIZER = "optimizer"
# Held free while tensors are written, so that a disk they fill has room for the small files that come after them.
_RESERVE, _RESERVE_BYTES = ".reserve", 64 << 20
_PIECE = 16 << 20  # bytes that are read at a time


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
        write_checksums(partial, "run", [name for name in _ALWAYS if (partial / name).exists()])
        lacking = set(_shards(partial)) - set(_checksums(partial))
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
                    doomed = folder.with_name(folder.name + ".removed")
                    folder.rename(doomed)  # so that a kill leaves no half of it under a whole one's name
                    shutil.rmtree(doomed, ignore_errors=True)
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


def missing_part(folder: Path, *, optimizer: bool = False) -> str | None:
    """What a checkpoint folder lacks: a file, or the end of one. None if it is whole; its bytes are not read.

    Args:
        folder: of the checkpoint.
        optimizer: optimizer state is wanted, which `drop_optimizer` may have taken out.
    """
    if not folder.is_dir():
        return "the folder is missing"
    for name in _ALWAYS:
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        needed = _shards(folder)
    except Exception as error:  # a damaged pickle can raise almost anything
        return f".metadata cannot be read ({type(error).__name__})"
    for name, size in needed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < size:
            return f"{name} holds {path.stat().st_size} of {size} bytes"
    if optimizer and not any(map(_is_optimizer, needed)):
        return "it was kept without its optimizer state"
    return None


def damaged_part(folder: Path, rank: int, ranks: int, *, optimizer: bool = False) -> str | None:
    """The first file of this rank's share whose bytes are not those that were written; None if there is none.

    Args: see `compare_checksums`.
    """
    return next(
        (problem for problem in compare_checksums(folder, rank, ranks, optimizer=optimizer) if problem), None
    )


def compare_checksums(
    folder: Path, rank: int, ranks: int, *, optimizer: bool = False
) -> Iterator[str | None]:
    """Read a rank's share of a checkpoint's files, and compare their sha256 with those they were written with.

    Args:
        folder: of the checkpoint.
        rank, ranks: whose share.
        optimizer: optimizer state is read, too; weights alone are a seventh of the bytes.

    Yields:
        What is wrong with a file; and None now and then, so that the caller can do something else meanwhile.
    """
    sums = {
        name: digest for name, digest in _checksums(folder).items() if optimizer or not _is_optimizer(name)
    }
    for name, expected in sorted(sums.items())[rank::ranks]:
        digest = hashlib.sha256()
        try:
            with (folder / name).open("rb") as stream:
                while piece := stream.read(_PIECE):
                    digest.update(piece)
                    yield None
        except OSError as error:
            yield f"{name} cannot be read ({error.strerror})"
            continue
        if digest.hexdigest() != expected:
            yield f"{name} is damaged (its sha256 is another than when it was written)"


def _is_optimizer(name: str) -> bool:
    return name.startswith(OPTIMIZER)


def weights_fingerprint(folder: Path) -> str:
    """One sha256 for the weights of a checkpoint, from the digests that its writers left; no tensor is read.

    It stays the same when the optimizer state is dropped, and names the same weights in any folder.

    Raises:
        OSError: the checksums, or without any its files, cannot be read.
    """
    sums = _checksums(folder) or {path.name: _sha256(path) for path in folder.iterdir() if path.is_file()}
    kept = [
        f"{digest}  {name}\n"
        for name, digest in sorted(sums.items())
        if not _is_optimizer(name) and name not in _ALWAYS
    ]
    return hashlib.sha256("".join(kept).encode()).hexdigest()


def write_checksums(folder: Path, writer: str, names: Iterable[str]) -> None:
    """Write `WRITER.sha256` for files of the folder, flushed to disk."""
    _write_sums(folder / f"{writer}{_SUMS}", {name: _sha256(folder / name) for name in names})


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the configuration of a checkpoint beside it, for people and for `saved_config`."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")


def drop_optimizer(folder: Path) -> None:
    """Take the optimizer state out of a checkpoint; its weights stay readable. Does nothing the second time.

    The files go last, so that a kill leaves something to do for the next call.
    """
    from torch.distributed.checkpoint import FileSystemReader

    doomed = {path.name for path in folder.iterdir() if _is_optimizer(path.name) and path.suffix != _SUMS}
    if not doomed:
        return
    metadata = FileSystemReader(folder).read_metadata()
    storage = metadata.storage_data or {}
    gone = {index for index, entry in storage.items() if entry.relative_path in doomed}
    keys = {index.fqn for index in gone}
    metadata.storage_data = {i: entry for i, entry in storage.items() if i not in gone}
    metadata.state_dict_metadata = {k: v for k, v in metadata.state_dict_metadata.items() if k not in keys}
    temporary = folder / ".metadata.partial"
    with temporary.open("wb") as stream:
        pickle.dump(metadata, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(folder / ".metadata")
    # Only the index has other bytes now: a new digest of the weights would call any damage to them whole.
    changed = {".metadata": _sha256(folder / ".metadata")}
    for path in folder.glob(f"*{_SUMS}"):
        sums = {name: changed.get(name, digest) for name, digest in _read_sums(path).items()}
        _write_sums(path, {name: digest for name, digest in sums.items() if name not in doomed})
    for name in doomed:
        (folder / name).unlink()


def _shards(folder: Path) -> dict[str, int]:
    """Files of tensors that the index names, and the bytes that each must have at least."""
    from torch.distributed.checkpoint import FileSystemReader

    needed: dict[str, int] = {}
    for entry in (FileSystemReader(folder).read_metadata().storage_data or {}).values():
        needed[entry.relative_path] = max(needed.get(entry.relative_path, 0), entry.offset + entry.length)
    return needed


def _checksums(folder: Path) -> dict[str, str]:
    return {name: digest for path in folder.glob(f"*{_SUMS}") for name, digest in _read_sums(path).items()}


def _read_sums(path: Path) -> dict[str, str]:
    lines = [line.split("  ", 1) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return {line[1]: line[0] for line in lines if len(line) == 2}


def _write_sums(path: Path, sums: dict[str, str]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(f"{digest}  {name}\n" for name, digest in sums.items())
        stream.flush()
        os.fsync(stream.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_to_disk(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
