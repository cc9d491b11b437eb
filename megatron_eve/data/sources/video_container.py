"""Container format of a video file and the size that its header declares, from its bytes."""

from __future__ import annotations

from megatron_eve.data.errors import SkipRow

# Names of top-level boxes of mp4 and mov.
_BOXES = frozenset(
    {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"pnot", b"uuid", b"sidx"}
)


def demuxer_of(data: bytes) -> str:
    """Name of ffmpeg's demuxer for a file, from its first bytes.

    Raises:
        SkipRow: the file is empty, has an unknown format, or is shorter than its header declares.
    """
    if not data:
        raise SkipRow("image_empty", "it has 0 bytes")
    head = data[:12]
    declared_size = 0  # bytes; 0 if unknown
    if head[4:8] in _BOXES:
        name, declared_size = "mov", _mov_size(data)
    elif head[:4] == b"RIFF" and head[8:] == b"AVI ":
        name, declared_size = "avi", 8 + int.from_bytes(data[4:8], "little")
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        name, declared_size = "matroska", _matroska_size(data)
    elif head[:1] == b"\x47" and data[188:189] == b"\x47" and data[376:377] == b"\x47":
        name = "mpegts"  # a transport stream may begin and end anywhere
    else:
        raise SkipRow("video_format", f"it begins with {head!r}")
    if declared_size > len(data):
        raise SkipRow("video_damaged", f"{len(data)} bytes, where its header declares {declared_size}")
    return name


def _mov_size(data: bytes) -> int:
    """Declared size in bytes of an mp4 or mov file: the end of its last top-level box."""
    at = 0
    while data[at + 4 : at + 8] in _BOXES:
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:  # 0: the box extends to the end of the file
            break
        at += size
    return at


def _matroska_size(data: bytes) -> int:
    """Declared size in bytes of a Matroska or WebM file; 0 if unknown, as in live recordings."""
    at = 4
    for element in (
        b"",
        b"\x18\x53\x80\x67",
    ):  # the header, whose id is skipped already; then the segment, which holds everything else
        if data[at : at + len(element)] != element:
            return 0
        at += len(element)
        lead = data[at] if at < len(data) else 0
        length = 9 - lead.bit_length()
        size = int.from_bytes(data[at : at + length], "big") - (lead.bit_length() and 1 << 7 * length)
        at += length
        if not lead or size == (1 << 7 * length) - 1:
            return 0
        at += size
    return at
