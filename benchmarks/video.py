"""Time to extract frames of a video, and the error of storing a frame as a JPEG file.

    python benchmarks/video.py --rounds 5 --frames 8 --out tables
    python benchmarks/video.py --toy

A clip of 30 seconds at 30 frames a second, a window that moves over a photo with noise, is encoded by x264 and libvpx.
`data/sources/frames.py` extracts frames; for comparison, every frame is decoded to get the same ones, as in the
`get_frame_from_vcap` of NVlabs/VILA. CPU time in one thread, medians of rounds in which both take turns. The difference
is in 8-bit levels, between a frame as PyAV decodes it and its JPEG file.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import simplejpeg
from gpu_common import parser, photos
from numpy.typing import NDArray
from tables import Table

from megatron_eve.data.sources.frames import extract_frames

WIDTH, HEIGHT, RATE = 640, 360, 30
# Name, encoder, suffix, frames from one key frame to the next; x264's own default is 250.
WAYS = (
    ("H.264, a key frame every 250", "libx264", ".mp4", 250),
    ("H.264, a key frame every 30", "libx264", ".mp4", 30),
    ("VP9, a key frame every 128", "libvpx-vp9", ".webm", 128),
)
OPTIONS: dict[str, dict[str, object]] = {
    "libx264": {},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
}


def clip(folder: Path, encoder: str, suffix: str, gop: int, count: int) -> bytes:
    """Encode a video of `count` frames."""
    scene = simplejpeg.decode_jpeg(photos(1, WIDTH + count, HEIGHT + count // 4)[0])
    noise = np.random.default_rng(0)
    path = folder / f"clip{suffix}"
    with av.open(str(path), "w") as out:
        stream = out.add_stream(encoder, rate=RATE)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options, stream.codec_context.gop_size = OPTIONS[encoder], gop
        for number in range(count):
            seen = scene[number // 4 : number // 4 + HEIGHT, number : number + WIDTH]
            pixels = (seen + noise.normal(0, 3, seen.shape)).clip(0, 255).astype(np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode(None))
    return path.read_bytes()


def decoded(data: bytes, wanted: set[int]) -> list[NDArray[np.uint8]]:
    """Decode all frames in one thread; returns the pixels of the wanted ones."""
    with av.open(BytesIO(data), "r") as container:
        container.streams.video[0].codec_context.thread_count = 1
        return [
            np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
            for number, frame in enumerate(container.decode(video=0))
            if number in wanted
        ]


def main() -> None:
    """Time both in turns and print the table."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5, help="passes, after one that is not counted")
    options.add_argument("--frames", type=int, default=8, help="frames to extract from a video")
    arguments = options.parse_args()
    count = RATE * (2 if arguments.toy else 30)
    header = (
        "640x360, 30 s", "bytes", "ms a video", "ms a frame taken", "ms a video, all frames decoded",
        "bytes of a frame", "levels, mean", "largest",
    )  # fmt: skip
    table = Table("video", header, arguments.out)
    places = set(np.linspace(0, count - 1, arguments.frames, dtype=int).tolist())
    with tempfile.TemporaryDirectory() as folder:
        clips = {name: clip(Path(folder), encoder, suffix, gop, count) for name, encoder, suffix, gop in WAYS}
    taken: dict[tuple[str, str], list[float]] = defaultdict(list)
    for turn in range(arguments.rounds + 1):
        for name, data in clips.items():
            began = time.process_time()
            extract_frames(data, count=arguments.frames, max_pixels=WIDTH * HEIGHT)
            ours = time.process_time()
            decoded(data, places)
            if turn:
                taken[name, "ours"].append(1000 * (ours - began))
                taken[name, "all"].append(1000 * (time.process_time() - ours))
    for name, data in clips.items():
        pictures = extract_frames(data, count=arguments.frames, max_pixels=WIDTH * HEIGHT)
        files, frames = pictures.files, decoded(data, places)
        apart = np.abs(
            np.stack([simplejpeg.decode_jpeg(file) for file in files]).astype(int) - np.stack(frames)
        )
        ours = statistics.median(taken[name, "ours"])
        table.add(
            name,
            f"{len(data):,}",
            f"{ours:.0f}",
            f"{ours / len(files):.1f}",
            f"{statistics.median(taken[name, 'all']):.0f}",
            f"{sum(map(len, files)) // len(files):,}",
            f"{apart.mean():.2f}",
            apart.max(),
        )
    table.close()


if __name__ == "__main__":
    main()
