"""Image files that rows name: by a path under --image-root, a `file:` URI or a `data:` URI."""

from __future__ import annotations

import base64
import binascii
import functools
import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.format.sample_block import MAX_ROW_BYTES
from megatron_eve.data.schema import ImageFile
from megatron_eve.runtime.errors import is_lfs_pointer

_URI = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_DATA_URI = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)


def image_file(name: str) -> ImageFile:
    """The image that a text names: a path, a `file:` URI, or a `data:` URI with the file in base64.

    Raises:
        SkipRow: it is a URL, of which nothing is downloaded, or the data is not base64.
    """
    if head := _DATA_URI.match(name):
        if not head[0].lower().endswith(";base64,"):
            raise SkipRow("image_data_uri", f"{name[:40]!r}: its data is not in base64")
        return ImageFile(data=from_base64(name[head.end() :]))
    if uri := _URI.match(name):
        parts = urlsplit(name) if uri[1].lower() == "file" else None
        if parts is None or parts.netloc not in ("", "localhost"):
            raise SkipRow("image_remote", f"{name:.200} is a URL")
        return ImageFile(path=unquote(parts.path))
    return ImageFile(path=name)


def from_base64(text: str) -> bytes:
    """The bytes of a base64 text, which may hold white space and lack padding.

    Raises:
        SkipRow: it is not base64.
    """
    packed = "".join(text.split()).rstrip("=")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SkipRow("image_data_uri", f"{text[:40]!r}: {error}") from None


def read_image_file(root: str, name: str, follow_links: bool = False) -> bytes:
    """Bytes of the file `name` under `root`.

    Args:
        root: a folder.
        name: relative to `root`, or absolute; it has to lie below `root`.
        follow_links: follow links wherever they lead; else as long as they stay under `root`.

    Raises:
        SkipRow: it leaves the root, is missing, is not a file, or cannot be read.
    """
    if "\0" in name:  # where some functions of os.path end a name
        raise SkipRow("image_field", f"{name!r:.80} cannot be a file name")
    try:
        path = _path_below(root, name, follow_links)
    except ValueError as error:
        if isinstance(error, SkipRow):
            raise
        raise SkipRow(
            "image_field", f"{name!r:.80} cannot be a file name"
        ) from None  # half of a surrogate pair
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise SkipRow("image_not_a_file", name)
        if status.st_size > MAX_ROW_BYTES:
            raise SkipRow("image_file_too_large", f"{name} has {status.st_size} bytes")
        data = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise SkipRow("image_missing", name) from None
    except OSError as error:
        raise SkipRow("image_unreadable", f"{name}: {error.strerror}") from error
    if is_lfs_pointer(data):
        raise SkipRow("image_lfs_pointer", name)
    return data


def _path_below(root: str, name: str, follow_links: bool) -> str:
    """The real path of `name` below `root`; raises SkipRow if it lies elsewhere, ValueError if it is no file name."""
    given, real_root = _root_paths(root)
    relative = name
    if os.path.isabs(name):
        # It may begin with the root as that is given, which may be a link, or lead there in another way.
        written = os.path.normpath(name)
        ways = [(given, written), (real_root, written), (real_root, os.path.realpath(name))]
        inside = [os.path.relpath(path, base) for base, path in ways if _is_below(base, path)]
        if not inside:
            raise SkipRow("image_outside_root", f"{name} is not inside --image-root {root}")
        relative = inside[0]
    if os.path.normpath(relative).split(os.sep)[0] == os.pardir:
        raise SkipRow("image_outside_root", f"{name} leads out of --image-root")
    path = os.path.realpath(os.path.join(real_root, os.path.normpath(relative) if follow_links else relative))
    if not follow_links and not _is_below(real_root, path):
        raise SkipRow("image_outside_root", f"{name} is a link to {path}, which --follow-links takes")
    return path


@functools.lru_cache(maxsize=8)
def _root_paths(root: str) -> tuple[str, str]:
    """A folder as it is given, and without links; asked for every picture."""
    return os.path.abspath(root), os.path.realpath(root)


def _is_below(folder: str, path: str) -> bool:
    return os.path.commonpath([folder, path]) == folder
