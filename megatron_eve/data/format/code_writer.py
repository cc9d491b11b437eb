"""Write the codes of a dataset (`code_part`) by several processes, on one node or many, any of which may be killed.

The images are cut into chunks. All processes work in one folder:

    OUT_codes.partial/
        settings.json   what the codes are made with (CodeSettings); who has other settings is refused
        codes.bin       the codes of all images, each chunk at its place
        00012.json      chunk 12 is on the disk: its damaged images. A chunk without this file is made again
        00012.lock      locked by the process that makes chunk 12
        manifest.json   the manifest, when all chunks are there
        in_use, lock    locked by every process; locked by the one that begins or ends the work

A process takes any chunk that is neither there nor locked, so the same command can be started any number of times, at
once or after a kill. What a chunk holds depends on the settings alone, so the codes do not depend on who made them.
Where files cannot be locked, a chunk may be made twice, which costs time alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.code_part import (
    CODE_DTYPE,
    CODES,
    CODES_MANIFEST,
    CodeInfo,
    CodePart,
    CodeSettings,
    blocks,
    has_codes,
    read_code_info,
    read_settings,
)
from megatron_eve.data.format.file_lock import lock_file
from megatron_eve.data.format.manifest import sync

_FOLDER = "_codes.partial"
_SOME_CHUNKS = 64  # chunks of a small dataset, to share out
_MOST_CHUNKS = 4096  # of a large one, to bound the number of files
_CHUNK_IMAGES = 256  # of a chunk, while there are fewer than `_MOST_CHUNKS`: all that a kill costs
_FIRST_DAMAGED = 5  # damaged images that the manifest names


@dataclass(frozen=True)
class Chunk:
    """Images first .. stop - 1, which this process makes the codes of.

    Attributes:
        number: of the chunk.
        lock: its locked file.
    """

    number: int
    first: int
    stop: int
    lock: IO[str]


def chunk_size(settings: CodeSettings) -> int:
    """Images of a chunk: whole micro-batches, so that these do not depend on who makes the chunk."""
    batches = -(-settings.num_images // settings.micro_batch_size)
    of_chunk = min(-(-batches // _SOME_CHUNKS), -(-_CHUNK_IMAGES // settings.micro_batch_size))
    return max(of_chunk, -(-batches // _MOST_CHUNKS)) * settings.micro_batch_size


def setting_differences(there: CodeSettings, wanted: CodeSettings) -> Iterator[str]:
    """In what codes that are there differ from those that are wanted: a clause each."""
    if there.dataset_sha256 != wanted.dataset_sha256 or there.num_images != wanted.num_images:
        yield "made of another dataset, or that was changed since"
    if there.tower_sha256 != wanted.tower_sha256 or there.family != wanted.family:
        yield f"made with another tower (sha256 {there.tower_sha256[:12]}...)"
    for name in ("fit", "dtype", "micro_batch_size"):
        ours, theirs = getattr(there, name), getattr(wanted, name)
        if ours != theirs:
            yield f"made with --{name.replace('_', '-')} {ours}, and this command has {theirs}"


def check_codes_output(prefix: str, settings: CodeSettings, overwrite: bool) -> CodeInfo | None:
    """Refuse a prefix that has other codes already, or codes that are damaged, unless they may be replaced.

    Returns:
        The manifest, if the codes with these settings are there and whole; None if there are none, or others that may
        be replaced.

    Raises:
        DataError: naming what is there and the remedy.
    """
    if not has_codes(prefix):
        return None
    path = prefix + CODES_MANIFEST
    try:
        info = CodePart(prefix).info
    except DataError:
        if overwrite:
            return None
        raise
    differences = list(setting_differences(info, settings))
    if not differences:
        return info
    if not overwrite:
        raise DataError(
            f"{path} is there already, {'; '.join(differences)}: add --overwrite to replace it, or choose another "
            "--output-prefix"
        )
    return None


class CodeWork:
    """The work on the codes of a dataset, which this process has joined.

    Args:
        prefix: of the codes; its folder is made. Codes that are there open until the new ones are complete.
        settings: what the codes are made with.
        overwrite: replace codes that are there, and unfinished ones, which were made with other settings.

    Attributes:
        finished: the manifest of the codes that were there, complete and with these settings; there is nothing to do
            then. None else.

    Raises:
        DataError: codes with other settings are there, or on their way; or the disk has no room.
    """

    def __init__(self, prefix: str, settings: CodeSettings, *, overwrite: bool) -> None:
        self.prefix = prefix
        self.settings = settings
        self.chunk_size = chunk_size(settings)
        self.num_chunks = -(-settings.num_images // self.chunk_size)
        self._folder = Path(prefix + _FOLDER)
        self._codes = self._folder / "codes.bin"
        self._in_use: IO[str] | None = None
        Path(prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
        with self._mutex():
            self._publish()
        with self._mutex():
            try:
                self.finished = check_codes_output(prefix, settings, overwrite)
            except DataError:
                if self._there() is None:  # nothing was begun, so the folder is this command's
                    self._remove_folder()
                raise
            if self.finished is None:
                self._begin(overwrite)
                self._in_use = lock_file(self._folder / "in_use", shared=True)
            elif self._begun_here():  # else another command replaces them
                self._remove_folder()

    def chunks(self) -> Iterator[Chunk]:
        """Chunks for this process, each locked until `write`, until other processes have all that are left."""
        while True:
            found = False
            for chunk in self._free(random.randrange(self.num_chunks)):  # processes seldom want the same one
                found = True
                yield chunk
            if not found:
                return

    def _free(self, start: int) -> Iterator[Chunk]:
        """Chunks that are neither there nor locked, each looked at once."""
        for number in (*range(start, self.num_chunks), *range(start)):
            mark, path = self._mark(number), self._folder / f"{number:05}.lock"
            try:
                if mark.exists() or (lock := lock_file(path)) is None:
                    continue
            except FileNotFoundError:  # the folder is gone: another process has finished
                return
            if mark.exists():  # another process made it in between
                self._unlock(path, lock)
                continue
            first = number * self.chunk_size
            yield Chunk(number, first, min(first + self.chunk_size, self.settings.num_images), lock)

    def write(self, chunk: Chunk, codes: NDArray[np.integer], damaged: Sequence[str]) -> None:
        """Write the codes of a chunk, and mark it as done when they are on the disk.

        Args:
            chunk: of `chunks`.
            codes: [images of the chunk, h, w, D].
            damaged: images of it that could not be decoded, each with the reason.

        Raises:
            DataError: a code that the codebook has not; OSError: the disk is full.
        """
        settings = self.settings
        if codes.shape != (chunk.stop - chunk.first, *settings.image_shape):
            raise ValueError(
                f"codes of {codes.shape} for {chunk.stop - chunk.first} x {settings.image_shape}"
            )
        if not 0 <= codes.min() <= codes.max() < settings.codebook_size:
            raise DataError(
                f"the tower gave codes {codes.min()} to {codes.max()} for images {chunk.first} to {chunk.stop - 1}, "
                f"and its codebook has {settings.codebook_size:,}: its weights do not belong to its configuration"
            )
        data = memoryview(np.ascontiguousarray(codes, CODE_DTYPE).tobytes())
        # Without locks another process may have made it, and finished.
        with contextlib.suppress(FileNotFoundError):
            self._write_at(data, chunk.first * settings.image_bytes)
            self._write_json(self._mark(chunk.number), list(damaged))
        self._unlock(self._folder / f"{chunk.number:05}.lock", chunk.lock)

    def _write_at(self, data: memoryview, offset: int) -> None:
        file = os.open(self._codes, os.O_WRONLY)
        try:
            while data:
                written = os.pwrite(file, data, offset)
                data, offset = data[written:], offset + written
            os.fsync(file)
        finally:
            os.close(file)

    def done_images(self) -> int:
        """Images whose codes are on the disk, whoever made them."""
        with contextlib.suppress(FileNotFoundError):
            marks = {
                name for name in os.listdir(self._folder) if name[:5].isdigit() and name.endswith(".json")
            }
            last = f"{self.num_chunks - 1:05}.json"
            short = self.num_chunks * self.chunk_size - self.settings.num_images
            return len(marks) * self.chunk_size - (short if last in marks else 0)
        return self.settings.num_images  # the folder is gone: another process has finished

    def finish(self) -> tuple[CodeInfo | None, bool]:
        """Put the codes in place if all chunks are there, the manifest last.

        Returns:
            The manifest; None if other processes still make some of the chunks, of which the last one finishes. And
            whether this process put the codes in place, not another one before.

        Raises:
            DataError: a code that the codebook has not is in the file.
        """
        with self._mutex():
            if not (self._folder / "settings.json").exists():  # another process has finished
                self._remove_folder()
                return read_code_info(self.prefix), False
            marks = [self._mark(number) for number in range(self.num_chunks)]
            if not all(mark.exists() for mark in marks):
                return None, False
            damaged = [reason for mark in marks for reason in json.loads(mark.read_text(encoding="utf-8"))]
            info = CodeInfo(
                **vars(self.settings),
                sha256=self._checked_digest(),
                num_damaged=len(damaged),
                damaged_first=damaged[:_FIRST_DAMAGED],
            )
            self._write_json(self._folder / "manifest.json", dataclasses.asdict(info))
            self._publish()
            return info, True

    def close(self) -> None:
        """Leave the work to others."""
        if self._in_use is not None:
            self._in_use.close()

    def __enter__(self) -> CodeWork:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _mutex(self) -> Iterator[None]:
        """One process at a time."""
        while True:
            self._folder.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # the folder was removed in between
                lock = lock_file(self._folder / "lock", wait=True)
                break
        assert lock is not None
        with lock:
            yield

    def _begin(self, overwrite: bool) -> None:
        """Make the files of the folder, unless they are there."""
        try:
            there = self._there()
            differences = list(setting_differences(there, self.settings)) if there else []
        except DataError:  # settings that cannot be read, such as another version's
            if not overwrite:
                raise
            there, differences = None, ["of which nothing can be said"]
        if there is not None and not differences:
            return
        if differences:
            alone = lock_file(self._folder / "in_use")
            if alone is None:
                raise DataError(
                    f"{self._folder} is being written by another command, {'; '.join(differences)}: wait until it has "
                    "ended, or choose another --output-prefix"
                )
            alone.close()
            if not overwrite:
                raise DataError(
                    f"{self._folder} holds unfinished codes, {'; '.join(differences)}: give what they were begun with, "
                    "or add --overwrite to begin anew"
                )
        for name in os.listdir(self._folder):
            if name != "lock":
                (self._folder / name).unlink()
        self._check_room()
        with self._codes.open("wb") as file:
            file.truncate(self.settings.num_bytes)
        self._write_json(self._folder / "settings.json", vars(self.settings))

    def _there(self) -> CodeSettings | None:
        """The settings of the work that has been begun, if any."""
        try:
            found: CodeSettings = read_settings(self._folder / "settings.json", CodeSettings)
        except FileNotFoundError:
            return None
        size = self._codes.stat().st_size if self._codes.exists() else 0
        return found if size == found.num_bytes else None

    def _begun_here(self) -> bool:
        """Is the folder this command's: nothing has been begun there, or what this one begins?"""
        try:
            return self._there() in (None, self.settings)
        except DataError:
            return True

    def _check_room(self) -> None:
        free = shutil.disk_usage(self._folder).free
        if free < self.settings.num_bytes:
            with contextlib.suppress(OSError):
                self._remove_folder()
            raise DataError(
                f"the codes of {self.settings.num_images:,} images take {self.settings.num_bytes / 2**30:,.2f} GiB, "
                f"and the disk of {self.prefix} has {free / 2**30:,.2f} GiB left: make room, or choose another "
                "--output-prefix"
            )

    def _checked_digest(self) -> str:
        """The sha256 of all codes, each of which is below the size of the codebook."""
        digest, settings = hashlib.sha256(), self.settings
        codes = np.memmap(self._codes, CODE_DTYPE, "r", shape=(settings.num_images, *settings.image_shape))
        for first, block in blocks(codes):
            digest.update(block.tobytes())
            if block.max() >= settings.codebook_size:
                raise DataError(
                    f"{self._codes}: images {first} to {first + len(block) - 1} have a code {block.max():,} where the "
                    f"codebook has {settings.codebook_size:,}: the disk damaged it; remove {self._folder} and begin "
                    "anew"
                )
        return digest.hexdigest()

    def _publish(self) -> None:
        """Give complete codes their names; goes on where a process was killed in between."""
        if not (self._folder / "manifest.json").exists():
            return
        if self._codes.exists():
            sync(str(self._codes))
            # From here on codes of before are gone.
            Path(self.prefix + CODES_MANIFEST).unlink(missing_ok=True)
            os.replace(self._codes, self.prefix + CODES)
        os.replace(self._folder / "manifest.json", self.prefix + CODES_MANIFEST)
        self._remove_folder()

    def _remove_folder(self) -> None:
        """Remove the folder, the lock last."""
        for name in sorted(os.listdir(self._folder), key=lambda name: name == "lock"):
            (self._folder / name).unlink()
        with contextlib.suppress(OSError):  # a process that waits for the lock may have made it again
            self._folder.rmdir()

    def _mark(self, number: int) -> Path:
        return self._folder / f"{number:05}.json"

    def _write_json(self, path: Path, content: object) -> None:
        """Write a file that is there whole or not at all."""
        own = path.with_name(f"{path.name}.{os.getpid()}.{random.getrandbits(32):08x}")
        own.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        sync(str(own))
        os.replace(own, path)

    def _unlock(self, path: Path, lock: IO[str]) -> None:
        path.unlink(missing_ok=True)
        lock.close()
