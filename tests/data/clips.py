"""Tiny videos, made with PyAV, whose frames say their own number."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import simplejpeg
from numpy.typing import NDArray

WIDTH, HEIGHT = 64, 48
_BITS = 8
ONE = 1 << 16  # of a display matrix

# What each suffix is written with; more than one of them has frames that are stored in another order than shown.
CODECS = {".mp4": "libx264", ".mkv": "libx264", ".mov": "mpeg4", ".webm": "libvpx-vp9", ".avi": "mpeg4"}


def numbered(number: int) -> NDArray[np.uint8]:
    """uint8 [48, 64, 3]: the number as eight bars, white for a bit that is set, the lowest on the left."""
    bits = [number >> bit & 1 for bit in range(_BITS)]
    return np.broadcast_to(
        np.repeat(np.array(bits, np.uint8) * 255, WIDTH // _BITS)[None, :, None], (HEIGHT, WIDTH, 3)
    )


def number_of(jpeg: bytes) -> int:
    """The number that a frame says."""
    pixels = simplejpeg.decode_jpeg(jpeg)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    bars = pixels.reshape(HEIGHT, _BITS, -1).mean(axis=(0, 2)) > 128
    return sum(int(bar) << bit for bit, bar in enumerate(bars))


def write_clip(
    path: Path,
    frames: int | Sequence[NDArray[np.uint8]] = 20,
    *,
    codec: str | None = None,
    rate: int = 10,
    times_ms: Sequence[int] | None = None,
    gop: int = 5,
    coding: dict[str, str] | None = None,
    colours: str | None = None,
    sound: bool = False,
    **options: Any,
) -> Path:
    """A video of `frames` numbered frames, or of the given ones.

    Args:
        path: its suffix says the container, and the codec where none is named.
        frames: their number, or uint8 [height, width, 3] each.
        codec: ffmpeg's name of an encoder.
        rate: frames a second, where `times_ms` does not say when each is shown.
        times_ms: milliseconds at which each frame is shown.
        gop: a key frame every so many.
        coding: options of the encoder.
        colours: "ITU601" or "ITU709", by which colours become luma and chroma; None says nothing, which means 601.
        sound: a second of silence beside the frames.
        options: of the container.
    """
    pictures = [numbered(number) for number in range(frames)] if isinstance(frames, int) else frames
    with av.open(str(path), "w", options={key: str(value) for key, value in options.items()}) as out:
        silence = out.add_stream("aac", rate=48_000) if sound else None
        if pictures:
            height, width = pictures[0].shape[:2]
            stream = out.add_stream(codec or CODECS[path.suffix], rate=rate)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.gop_size, stream.options = gop, coding or {}
            if times_ms is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            if colours is not None:
                stream.codec_context.colorspace = {"ITU709": 1, "ITU601": 6}[colours]
            for number, picture in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame = frame.reformat(format="yuv420p", dst_colorspace=colours or "ITU601")
                if times_ms is not None:
                    frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        if silence is not None:
            _write_silence(out, silence)
    return path


def _write_silence(out: Any, stream: Any) -> None:
    for start in range(0, 48_000, 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = 48_000, start
        out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def turned(path: Path, a: int, b: int, c: int, d: int) -> bytes:
    """The bytes of an mp4 with a display matrix: (x, y) is shown at (a x + c y, b x + d y), up to a shift."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # version and flags, times, ids, layer and volume
    matrix = np.array([a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()
    assert data[start : start + 4] == ONE.to_bytes(4, "big")
    data[start : start + 36] = matrix
    return bytes(data)
