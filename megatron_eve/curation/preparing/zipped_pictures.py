"""`ZippedPictures`, which reads pictures from a zip archive by their names, without unpacking it."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.format.sample_block import MAX_ROW_BYTES


class ZippedPictures:
    """The pictures of a zip archive. Each process opens the archive for itself, and holds its list of names.

    Args:
        path: of the archive.

    Raises:
        DataError: it is not a complete zip archive.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._archive: zipfile.ZipFile | None = None
        self._open().close()

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_archive": None}

    def read(self, name: str) -> bytes:
        """Bytes of a picture.

        Args:
            name: of the member.

        Raises:
            SkipRow: there is no such member, it is too large, or it is damaged.
        """
        if self._archive is None:
            self._archive = self._open()
        try:
            member = self._archive.getinfo(name)
        except KeyError:
            raise SkipRow("image_missing", f"{name} is not in {self._path.name}") from None
        if member.file_size > MAX_ROW_BYTES:
            raise SkipRow("image_file_too_large", f"{name} has {member.file_size} bytes")
        try:
            return self._archive.read(member)
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            RuntimeError,
            NotImplementedError,
            OSError,
        ) as error:
            raise SkipRow("image_unreadable", f"{name} in {self._path.name}: {error}") from error

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self._path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(
                f"{self._path} is not a complete zip archive ({error}): download it again, or unpack it"
            ) from error
