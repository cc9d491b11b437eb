"""The files of one checkpoint: checking that they are complete, fingerprint of the weights, dropping optimizer state.

Each rank writes `*.sha256` for its own files, in the format of `sha256sum -c`. Nothing here communicates with other
ranks.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_eve.checkpoint.lease import is_lease
from megatron_eve.runtime.digests import file_digest, file_digest_in_pieces

# Written once per checkpoint, beside the tensors of the ranks.
ALWAYS = ("metadata.json", "common.pt", ".metadata", "config.yaml")
# Prefix of the files of optimizer state, which is written apart from the weights (megatron-core's `separation_hint`).
OPTIMIZER = "optimizer"
_SUMS = ".sha256"


def missing_part(folder: Path, *, optimizer: bool = False) -> str | None:
    """What is missing in a checkpoint folder: a file, or the end of one. None if it is complete; contents are not read.

    Args:
        folder: of the checkpoint.
        optimizer: also require optimizer state, which `drop_optimizer` may have removed.
    """
    if not folder.is_dir():
        return "the folder is missing"
    for name in ALWAYS:
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        needed = shards_of(folder)
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
    """What is wrong with the first damaged file of this rank's share; None if no file is.

    Args: see `compare_checksums`.
    """
    work = compare_checksums(folder, rank, ranks, optimizer=optimizer)
    return next((result for result in work if isinstance(result, str)), None)


def compare_checksums(folder: Path, rank: int, ranks: int, *, optimizer: bool = False) -> Iterator[int | str]:
    """Read a rank's share of a checkpoint's files, and compare their sha256 with the recorded ones.

    Args:
        folder: of the checkpoint.
        rank, ranks: this rank, and how many share the work.
        optimizer: also read optimizer state; the weights alone are a seventh of the bytes.

    Yields:
        The number of bytes read since the last value (for a progress bar), or a message about a file that is wrong.
    """
    for name, expected in _share(folder, rank, ranks, optimizer):
        try:
            digest = yield from file_digest_in_pieces(folder / name)
        except OSError as error:
            yield f"{name} cannot be read ({error.strerror})"
            continue
        if digest != expected:
            yield f"{name} is damaged (its sha256 is another than when it was written)"


def checked_bytes(folder: Path, rank: int, ranks: int, *, optimizer: bool = False) -> int:
    """Bytes that `compare_checksums` reads."""
    paths = [folder / name for name, _ in _share(folder, rank, ranks, optimizer)]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _share(folder: Path, rank: int, ranks: int, optimizer: bool) -> list[tuple[str, str]]:
    """(name, recorded sha256) of the files in a rank's share."""
    sums = sorted(checksums_of(folder).items())
    return [one for one in sums if optimizer or not _is_optimizer(one[0])][rank::ranks]


def _is_optimizer(name: str) -> bool:
    return name.startswith(OPTIMIZER)


def weights_fingerprint(folder: Path) -> str:
    """One sha256 for the weights of a checkpoint, computed from the recorded checksums; no tensor is read.

    Dropping optimizer state or moving the folder does not change it.

    Raises:
        OSError: the checksums cannot be read (or, if there are none, the files).
    """
    sums = checksums_of(folder) or {
        path.name: file_digest(path)
        for path in folder.iterdir()
        if path.is_file() and not is_lease(path.name)
    }
    kept = [
        f"{digest}  {name}\n"
        for name, digest in sorted(sums.items())
        if not _is_optimizer(name) and name not in ALWAYS
    ]
    return hashlib.sha256("".join(kept).encode()).hexdigest()


def write_checksums(folder: Path, writer: str, names: Iterable[str]) -> None:
    """Write `WRITER.sha256` for files of the folder, flushed to disk."""
    _write_sums(folder / f"{writer}{_SUMS}", {name: file_digest(folder / name) for name in names})


def write_config(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write settings (`RunConfig.to_dict` of a run) to `config.yaml` in the checkpoint."""
    text = yaml.safe_dump(dict(settings), sort_keys=False)
    (folder / "config.yaml").write_text(text, encoding="utf-8")


def drop_optimizer(folder: Path) -> None:
    """Remove the optimizer state from a checkpoint; its weights stay readable. Does nothing the second time.

    The files are removed last, so that after a kill the next call finishes the work.
    """
    from torch.distributed.checkpoint import FileSystemReader

    to_remove = {path.name for path in folder.iterdir() if _is_optimizer(path.name) and path.suffix != _SUMS}
    if not to_remove:
        return
    metadata = FileSystemReader(folder).read_metadata()
    storage = metadata.storage_data or {}
    gone = {index for index, entry in storage.items() if entry.relative_path in to_remove}
    keys = {index.fqn for index in gone}
    metadata.storage_data = {i: entry for i, entry in storage.items() if i not in gone}
    metadata.state_dict_metadata = {k: v for k, v in metadata.state_dict_metadata.items() if k not in keys}
    temporary = folder / ".metadata.partial"
    with temporary.open("wb") as stream:
        pickle.dump(metadata, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(folder / ".metadata")
    # Recompute only the index's checksum: recomputing those of the weights would hide damage to them.
    changed = {".metadata": file_digest(folder / ".metadata")}
    for path in folder.glob(f"*{_SUMS}"):
        sums = {name: changed.get(name, digest) for name, digest in _read_sums(path).items()}
        _write_sums(path, {name: digest for name, digest in sums.items() if name not in to_remove})
    for name in to_remove:
        (folder / name).unlink()


def shards_of(folder: Path) -> dict[str, int]:
    """Tensor files that the index names, and the smallest size in bytes that each must have."""
    from torch.distributed.checkpoint import FileSystemReader

    needed: dict[str, int] = {}
    for entry in (FileSystemReader(folder).read_metadata().storage_data or {}).values():
        needed[entry.relative_path] = max(needed.get(entry.relative_path, 0), entry.offset + entry.length)
    return needed


def checksums_of(folder: Path) -> dict[str, str]:
    """The recorded sha256 of each file, by name."""
    return {name: digest for path in folder.glob(f"*{_SUMS}") for name, digest in _read_sums(path).items()}


def _read_sums(path: Path) -> dict[str, str]:
    lines = [line.split("  ", 1) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return {line[1]: line[0] for line in lines if len(line) == 2}


def _write_sums(path: Path, sums: dict[str, str]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(f"{digest}  {name}\n" for name, digest in sums.items())
        stream.flush()
        os.fsync(stream.fileno())


def sync_to_disk(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
