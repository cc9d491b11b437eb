"""What the bytes of a video file say of themselves: which container it is, and how long it should be."""

from __future__ import annotations

from megatron_eve.data.errors import SkipRow

# Names of the outermost parts of mp4 and mov.
_BOXES = frozenset(
    {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"pnot", b"uuid", b"sidx"}
)


def demuxer_of(data: bytes) -> str:
    """ffmpeg's name of the container that the file is, from its first bytes.

    Raises:
        SkipRow: it is empty, none of the known ones, or says itself that it has more bytes than there are.
    """
    if not data:
        raise SkipRow("image_empty", "it has 0 bytes")
    head = data[:12]
    declared_size = 0  # bytes that the file should have
    if head[4:8] in _BOXES:
        name, declared_size = "mov", _mov_size(data)
    elif head[:4] == b"RIFF" and head[8:] == b"AVI ":
        name, declared_size = "avi", 8 + int.from_bytes(data[4:8], "little")
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        name, declared_size = "matroska", _matroska_size(data)
    elif head[:1] == b"\x47" and data[188:189] == b"\x47" and data[376:377] == b"\x47":
        name = "mpegts"  # a broadcast, which may begin and end anywhere
    else:
        raise SkipRow("video_format", f"it begins with {head!r}")
    if declared_size > len(data):
        raise SkipRow("video_damaged", f"{len(data)} bytes, of {declared_size} that its head says")
    return name


def _mov_size(data: bytes) -> int:
    """Bytes that a file of mp4 or mov should have: where the last of its outermost parts ends."""
    at = 0
    while data[at + 4 : at + 8] in _BOXES:
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:  # 0: up to the end, wherever that is
            break
        at += size
    return at


def _matroska_size(data: bytes) -> int:
    """Bytes that a file of Matroska or WebM should have; 0 where it does not say so, as of a live recording."""
    at = 4
    for element in (
        b"",
        b"\x18\x53\x80\x67",
    ):  # behind the id of the head; the segment, which has all else in it
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
