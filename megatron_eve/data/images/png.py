"""Removes the text and colour profile chunks of a PNG file before it is decoded.

Pillow unpacks every text chunk and refuses the whole picture if one is long (an editor's history, a workflow, a colour
profile), since a small file can hold gigabytes of text. Only the orientation is needed, so the other texts are removed
before Pillow reads the file.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
# Keywords of the texts in which Pillow looks for an orientation.
_ORIENTED = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
# Most bytes of such texts, unpacked, that are read from one file.
_TEXT_LIMIT = 16 << 20


def without_texts(data: bytes) -> bytes:
    """A file without its texts and colour profile, none of which changes a pixel.

    Texts that may hold the orientation are kept, unpacked, up to 16 MiB in all; after one that is longer or damaged,
    none is kept.

    Args:
        data: a file of any format.

    Returns:
        A PNG file with the same pixels and orientation; `data` itself if there is nothing to leave out.
    """
    parts: list[bytes] = []
    copied, room = 0, _TEXT_LIMIT
    for kind, start, end in _chunks(data):
        if kind not in _TEXTS and kind != b"iCCP":
            continue
        parts.append(data[copied:start])
        copied = end
        if _is_oriented(data, kind, start):
            text = _unpacked(kind, data[start + 8 : end - 4], room)
            room = room - len(text) if text else 0
            parts.append(text)
    return b"".join([*parts, data[copied:]]) if parts else data


def may_be_turned(data: bytes) -> bool:
    """Whether a PNG file has a chunk that can hold an orientation."""
    return any(kind == b"eXIf" or _is_oriented(data, kind, start) for kind, start, _ in _chunks(data))


def _is_oriented(data: bytes, kind: bytes, start: int) -> bool:
    return kind in _TEXTS and data.startswith(_ORIENTED, start + 8)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each whole chunk; none of a file in another format."""
    if not data.startswith(_SIGNATURE):
        return
    at = len(_SIGNATURE)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data) or kind == b"IEND":
            return
        yield kind, at, end
        at = end


def _unpacked(kind: bytes, content: bytes, room: int) -> bytes:
    """A text of at most `room` bytes as an uncompressed chunk; empty if it is longer or damaged."""
    keyword, _, rest = content.partition(b"\0")
    packed = None
    if kind == b"zTXt":
        packed = rest[1:]
    elif kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    if packed is not None:
        try:
            text = zlib.decompressobj().decompress(packed, room + 1)
        except zlib.error:
            return b""
        kind, content = b"tEXt", keyword + b"\0" + text
    if len(content) + 12 > room:
        return b""
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum
