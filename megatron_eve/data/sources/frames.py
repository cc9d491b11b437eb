"""Extracts frames of a video at evenly spaced times, as JPEG files.

The frames are those of NVlabs/VILA (`llava/mm_utils.py`, `get_frame_from_vcap`): at N times from the first frame to the
last, both included. It counts frames (`np.linspace(0, frames - 1, N, dtype=int)`); this module compares presentation
timestamps. With a constant frame rate the frames are the same; with a variable one they are those that a player shows
at these times. A frame shown at several of the times is extracted once, so a video of fewer than N frames gives all of
its frames, as in NVlabs/VILA.

PyAV (ffmpeg) decodes on the CPU, in one thread, since workers are processes. ffmpeg gets the bytes and the name of one
demuxer, chosen from the first bytes, so it never opens another file or a URL.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.sources.video_container import demuxer_of

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

JPEG_QUALITY = 95
"""Quality of the JPEG files of frames; their colours are not subsampled (4:4:4)."""

# Accepted decoders of ffmpeg. It has some 200 for video, most of them for games and old cameras.
_CODECS = frozenset(
    [
        "h264",
        "hevc",
        "libdav1d",
        "av1",
        "vp8",
        "vp9",
        "mpeg1video",
        "mpeg2video",
        "mpeg4",
        "msmpeg4v2",
        "msmpeg4",
        "h263",
        "mjpeg",
        "prores",
    ]
)
_MOST_FRAMES = 1_000_000  # of a video: 9 hours at 30 a second
_MOST_DECODED = 1_000  # for one extracted frame; encoders write a key frame at least every 250
_HIGHEST_CLOCK = Fraction(1, 1000)  # seconds; with a finer or equal clock, timestamps may be off by one tick


@dataclass(frozen=True, slots=True)
class VideoFrames:
    """Frames extracted from a video.

    Attributes:
        files: bytes of a JPEG file for each frame, in order of time.
        times: seconds of each, counted from the first frame of the video.
        duration: seconds from the first frame of the video to the end of its last.
    """

    files: list[bytes]
    times: list[float]
    duration: float


@dataclass(frozen=True, slots=True)
class _Timeline:
    """Timestamps of all frames of a video, from its container, in storage (decoding) order.

    Attributes:
        stamps: presentation timestamp of each frame, in ticks of the stream's clock.
        keys: indices of the key frames, ascending.
        shown: timestamps of the frames that are shown, ascending and distinct.
        end: end of the last frame, in ticks.
        counted: whether frames are counted instead, for H.264 and HEVC in AVI, which has decoding timestamps only.
    """

    stamps: array[int]
    keys: array[int]
    shown: list[int]
    end: int
    counted: bool


def extract_frames(data: bytes, *, count: int, max_pixels: int, upright: bool = True) -> VideoFrames:
    """Extract the frames of a video at `count` evenly spaced times, each as a JPEG file (quality 95, 4:4:4).

    Frames keep the stored pixels: pixel aspect ratio, interlacing and high dynamic range are not converted. Frames
    that are not needed are neither decoded nor checked.

    Args:
        data: bytes of an mp4, mov, webm, mkv, avi or MPEG-TS file. Its first video stream is used.
        count: N, at least 1; 1 gives the first frame.
        max_pixels: maximum width x height of a frame; checked before anything is decoded.
        upright: rotate and mirror frames by the display matrix of the file.

    Raises:
        SkipRow: the video cannot be used; the reason begins with "video_", or is "image_too_large".
        DataError: PyAV is not installed.
    """
    av = _pyav()
    demuxer = demuxer_of(data)
    try:
        with _open(data, demuxer) as container:
            stream = _video_stream(container)
            _check_size(stream.codec_context.width, stream.codec_context.height, max_pixels)
            timeline = _timeline(container, stream)
            tick = Fraction(stream.time_base or 0)
        wanted = _requested_stamps(timeline, count, tick)
        plan = _decode_plan(timeline, wanted)
        with _open(data, demuxer) as container:
            stream = _video_stream(container)
            stream.codec_context.thread_count = 1
            # A second check by the decoder. It is looser than max_pixels, since decoders also count margins.
            stream.codec_context.options = {"max_pixels": str(4 * max_pixels + (1 << 20))}
            files = [
                _encode_jpeg(frame, max_pixels, upright)
                for frame in _decode(container, stream, timeline, plan)
            ]
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise SkipRow("video_damaged", str(error)[:160]) from None
    first = timeline.shown[0]
    return VideoFrames(
        files,
        [round(float((stamp - first) * tick), 3) for stamp in wanted],
        round(float((timeline.end - first) * tick), 3),
    )


def _pyav() -> Any:
    """Import PyAV, only when there is a video: the import takes 0.1 s."""
    try:
        import av
    except ImportError as error:
        raise DataError(
            f"the input has videos, and PyAV, which decodes them, cannot be imported ({error}): pip install av"
        ) from error
    return av


def _open(data: bytes, demuxer: str) -> InputContainer:
    import av

    return av.open(
        BytesIO(data),
        "r",
        format=demuxer,
        # No other file or URL is opened, and nothing is decoded while the streams are probed.
        container_options={"protocol_whitelist": "none", "codec_whitelist": "none"},
        metadata_errors="ignore",
        buffer_size=1 << 20,
    )


def _video_stream(container: InputContainer) -> VideoStream:
    """The first video stream that is not an attached picture, such as an album cover."""
    from av.stream import Disposition

    if not container.streams:
        raise SkipRow(
            "video_damaged", "it holds no stream: the part that lists them, often its end, is missing"
        )
    videos = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
    if not videos:
        raise SkipRow(
            "video_no_frames", f"streams of {', '.join(one.type for one in container.streams)!s:.80}"
        )
    stream = videos[0]
    name = "unknown" if stream.codec_context is None else stream.codec_context.name
    if name not in _CODECS:
        raise SkipRow("video_format", f"its codec is {name}, which is none of {', '.join(sorted(_CODECS))}")
    return stream


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise SkipRow("image_too_large", f"frames of {width}x{height}, more than {max_pixels} pixels")


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    return (packet for packet in container.demux(stream) if packet.size)


def _timeline(container: InputContainer, stream: VideoStream) -> _Timeline:
    """Read the timestamps of all frames, without decoding.

    Raises:
        SkipRow: there are no frames or too many, the file is truncated, or timestamps are missing.
    """
    counted = container.format.name == "avi" and stream.codec_context.name in ("h264", "hevc")
    stamps, keys, shown, end = array("q"), array("q"), set[int](), 0
    for packet in _packets(container, stream):
        stamp = packet.dts if counted or packet.pts is None else packet.pts
        if packet.is_corrupt:
            raise SkipRow("video_damaged", f"it is truncated in frame {len(stamps) + 1}")
        if stamp is None:
            raise SkipRow("video_damaged", f"frame {len(stamps) + 1} has no time at which it is shown")
        if len(stamps) == _MOST_FRAMES:
            raise SkipRow("video_too_long", f"more than {_MOST_FRAMES:,} frames")
        if packet.is_keyframe:
            keys.append(len(stamps))
        stamps.append(stamp)
        if not packet.is_discard:  # removed by an edit list: decoded, but not shown
            shown.add(stamp)
            end = max(end, stamp + (packet.duration or 0))
    if not shown:
        raise SkipRow("video_no_frames", "its video stream is empty")
    if not stream.time_base:
        raise SkipRow("video_damaged", "its clock has no rate")
    return _Timeline(stamps, keys, sorted(shown), end, counted)


def _requested_stamps(timeline: _Timeline, count: int, tick: Fraction) -> list[int]:
    """Timestamps of the frames that are shown at `count` evenly spaced times, without repetition."""
    first, last = timeline.shown[0], timeline.shown[-1]
    # WebM rounds timestamps to milliseconds, so a computed time may be one tick before its frame.
    slack = 1 if tick <= _HIGHEST_CLOCK else 0
    times = (first + (last - first) * number // max(count - 1, 1) + slack for number in range(count))
    return list(dict.fromkeys(timeline.shown[bisect_right(timeline.shown, time) - 1] for time in times))


def _decode_plan(timeline: _Timeline, wanted: Sequence[int]) -> list[tuple[int, list[int]]]:
    """List of (index of the frame where decoding starts, timestamps requested from there on).

    Raises:
        SkipRow: too many frames would have to be decoded for one of them.
    """
    places = {stamp: place for place, stamp in enumerate(timeline.stamps)}
    plan: list[tuple[int, list[int]]] = []
    reached = 0
    for stamp in wanted:
        key = bisect_right(timeline.keys, places[stamp]) - 1
        while (
            key > 0 and timeline.stamps[timeline.keys[key]] > stamp
        ):  # stored after a key frame, but shown before it
            key -= 1
        start = timeline.keys[key] if key >= 0 else 0
        if not plan or start > reached:  # otherwise an earlier frame is stored after this key frame
            plan.append((start, []))
            reached = start
        if places[stamp] - reached >= _MOST_DECODED:
            raise SkipRow(
                "video_too_long",
                f"{places[stamp] - reached} frames have to be decoded for one frame: key frames are too far apart",
            )
        reached = max(reached, places[stamp])
        plan[-1][1].append(stamp)
    return plan


def _decode(
    container: InputContainer,
    stream: VideoStream,
    timeline: _Timeline,
    plan: Sequence[tuple[int, list[int]]],
) -> Iterator[VideoFrame]:
    """Decode the frames of a plan, in order of time; frames that are not needed for it are skipped."""
    context = stream.codec_context
    left, selector = deque(plan), _FrameSelector(timeline, 0, [])
    for place, packet in enumerate(_packets(container, stream)):
        if left and left[0][0] == place:
            yield from selector.finish(context.decode(None) if selector.wanted else [])
            context.flush_buffers()
            selector = _FrameSelector(timeline, *left.popleft())
        if selector.wanted:
            yield from selector.take(context.decode(packet))
        elif not left:
            return
    yield from selector.finish(context.decode(None) if selector.wanted else [])


class _FrameSelector:
    """Selects the frames with requested timestamps from the output of a decoder.

    Args:
        timeline: of the video.
        start: index of the frame where decoding starts.
        wanted: requested timestamps, ascending.
    """

    def __init__(self, timeline: _Timeline, start: int, wanted: Sequence[int]) -> None:
        self.wanted = deque(wanted)
        self._shown = timeline.shown
        self._counted = iter(timeline.stamps[start:]) if timeline.counted else None
        self._last: tuple[int, VideoFrame] | None = None

    def take(self, frames: Sequence[VideoFrame]) -> Iterator[VideoFrame]:
        """Requested frames among the next decoded ones."""
        for frame in frames:
            if not self.wanted:
                return
            stamp = (
                next(self._counted, None) if self._counted else frame.dts if frame.pts is None else frame.pts
            )
            if stamp is None:
                continue
            if frame.is_corrupt:
                raise SkipRow("video_damaged", "a frame cannot be decoded whole")
            while self.wanted and self.wanted[0] < stamp:
                yield self._frame_shown_before()
            self._last = stamp, frame
            if self.wanted and self.wanted[0] == stamp:
                self.wanted.popleft()
                yield frame

    def finish(self, frames: Sequence[VideoFrame]) -> Iterator[VideoFrame]:
        """Requested frames among the last decoded ones."""
        yield from self.take(frames)
        while self.wanted:
            yield self._frame_shown_before()

    def _frame_shown_before(self) -> VideoFrame:
        """The frame shown before a requested one that the decoder does not return: VP8 has hidden frames."""
        place = bisect_left(self._shown, self.wanted.popleft())
        if self._last is None or place == 0 or self._last[0] != self._shown[place - 1]:
            raise SkipRow("video_damaged", "frames are missing where they should be decoded")
        return self._last[1]


def _encode_jpeg(frame: VideoFrame, max_pixels: int, upright: bool) -> bytes:
    _check_size(frame.width, frame.height, max_pixels)  # the size may change in the middle of a stream
    pixels = np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
    if upright and (matrix := cast("Any", frame.side_data.get("DISPLAYMATRIX"))) is not None:
        pixels = _upright(pixels, np.frombuffer(bytes(matrix)[:36], dtype=np.int32).reshape(3, 3))
    file: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444"
    )
    return file


def _upright(pixels: NDArray[np.uint8], matrix: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Rotate a frame by the multiple of 90 degrees nearest to its display matrix, and mirror it.

    Args:
        pixels: uint8 [height, width, 3].
        matrix: int32 [3, 3]; (x, y, 1) times it is the position at which a pixel is shown.
    """
    (a, b), (c, d) = matrix[:2, :2].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
