"""Which frames of a video become pictures, and which files are refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import simplejpeg

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.reasons import REASONS
from megatron_eve.data.sources.frames import VideoFrames, extract_frames
from tests.data.clips import CODECS, HEIGHT, WIDTH, number_of, turned, write_clip

LIMIT = 1 << 20  # pixels of a frame


def take(data: bytes | Path, count: int = 8, **options: bool) -> VideoFrames:
    data = data if isinstance(data, bytes) else data.read_bytes()
    return extract_frames(data, count=count, max_pixels=LIMIT, **options)


def numbers(data: bytes | Path, count: int = 8) -> list[int]:
    return [number_of(file) for file in take(data, count).files]


def refused(data: bytes | Path, count: int = 8) -> str:
    with pytest.raises(SkipRow) as caught:
        take(data, count)
    assert caught.value.reason in REASONS
    return str(caught.value)


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize(("frames", "rate"), [(50, 30), (97, 24), (20, 10)])
def test_frames_of_a_constant_rate_are_those_of_vila(
    tmp_path: Path, suffix: str, frames: int, rate: int
) -> None:
    clip = write_clip(tmp_path / f"clip{suffix}", frames, rate=rate)
    taken = take(clip)
    places = np.linspace(0, frames - 1, 8, dtype=int)
    assert [number_of(file) for file in taken.files] == places.tolist()
    assert taken.times == pytest.approx((places / rate).tolist(), abs=0.001)
    assert taken.duration == pytest.approx(frames / rate, abs=0.002)


@pytest.mark.parametrize("codec", ["libvpx", "libx265"])
def test_other_codecs(tmp_path: Path, codec: str) -> None:
    assert numbers(write_clip(tmp_path / "clip.mkv", 20, codec=codec)) == [0, 2, 5, 8, 10, 13, 16, 19]


@pytest.mark.parametrize(("codec", "coding"), [
    ("libx264", {"bf": "0"}), ("libx264", {"bf": "3"}), ("mpeg4", {"bf": "2"}), ("msmpeg4", {}),
])  # fmt: skip
def test_avi_says_when_frames_are_decoded(tmp_path: Path, codec: str, coding: dict[str, str]) -> None:
    clip = write_clip(tmp_path / "clip.avi", 60, codec=codec, gop=12, coding=coding)
    assert numbers(clip) == np.linspace(0, 59, 8, dtype=int).tolist()
    assert take(clip).times[-1] == 5.9


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_frames_that_are_stored_behind_the_next_key_frame(tmp_path: Path, codec: str) -> None:
    """Open groups of pictures: frames in front of a key frame that are stored behind it."""
    private = {"libx264": "x264-params", "libx265": "x265-params"}[codec]
    coding = {private: "open-gop=1:bframes=4:keyint=8:b-adapt=0:scenecut=0"}
    clip = write_clip(tmp_path / "clip.mp4", 60, codec=codec, gop=8, coding=coding)
    for count in (8, 13, 60):
        assert numbers(clip, count) == np.linspace(0, 59, count, dtype=int).tolist()


def test_a_trimmed_file_begins_where_it_was_trimmed(tmp_path: Path) -> None:
    """An edit list, as phones write it: from 1.0 to 3.0 seconds."""
    data = bytearray(write_clip(tmp_path / "clip.mp4", 60, gop=8, coding={"bf": "0"}).read_bytes())
    entry = data.index(b"elst") + 12
    clock = data.index(b"mdhd") + 16
    ticks = int.from_bytes(data[clock : clock + 4], "big")
    data[entry : entry + 8] = (2000).to_bytes(4, "big") + ticks.to_bytes(4, "big")
    taken = take(bytes(data))
    assert [number_of(file) for file in taken.files] == [10 + place for place in (0, 2, 5, 8, 10, 13, 16, 19)]
    assert (taken.times[0], taken.duration) == (0.0, 2.0)


@pytest.mark.parametrize("count", [1, 2, 3, 20, 64])
def test_as_many_as_asked_for_and_each_once(tmp_path: Path, count: int) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 20, gop=7)
    assert numbers(clip, count) == list(dict.fromkeys(np.linspace(0, 19, count, dtype=int).tolist()))


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_a_short_video_gives_each_of_its_frames(tmp_path: Path, frames: int) -> None:
    assert numbers(write_clip(tmp_path / "clip.mp4", frames)) == list(range(frames))


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv"])
def test_a_variable_rate_takes_what_is_shown_at_the_time(tmp_path: Path, suffix: str) -> None:
    times = [0, 40, 80, 120, 1000, 2500, 2540, 2580, 9000, 9040, 9080, 12_000]
    clip = write_clip(tmp_path / f"clip{suffix}", 12, times_ms=times, gop=4)
    at = [12_000 * step / 7 for step in range(8)]  # 0, 1714, 3429, 5143, 6857, 8571, 10286, 12000
    shown = [max(place for place, start in enumerate(times) if start <= moment) for moment in at]
    assert shown == [0, 4, 7, 7, 7, 7, 10, 11]
    taken = take(clip)
    assert [number_of(file) for file in taken.files] == [0, 4, 7, 10, 11]
    assert taken.times == [0.0, 1.0, 2.58, 9.08, 12.0]


def test_times_count_from_the_first_frame(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mkv", 3, times_ms=[5000, 6000, 8000])
    taken = take(clip, 3)
    assert taken.times == [0.0, 1.0, 3.0]


def test_a_file_in_pieces(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 20, movflags="frag_keyframe+empty_moov")
    assert numbers(clip) == [0, 2, 5, 8, 10, 13, 16, 19]


@pytest.mark.parametrize(("a", "b", "c", "d"), [
    (1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0),
    (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0),
])  # fmt: skip
def test_frames_are_turned_upright(tmp_path: Path, a: int, b: int, c: int, d: int) -> None:
    """Four corners of four colours, each found where the matrix shows it."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    colours = {(0, 0): (255, 0, 0), (1, 0): (0, 255, 0), (0, 1): (0, 0, 255), (1, 1): (255, 255, 255)}
    for (x, y), colour in colours.items():
        picture[y * HEIGHT // 2 : (y + 1) * HEIGHT // 2, x * WIDTH // 2 : (x + 1) * WIDTH // 2] = colour
    data = turned(write_clip(tmp_path / "clip.mp4", [picture]), a, b, c, d)
    (shown,) = (simplejpeg.decode_jpeg(file) for file in take(data).files)
    assert shown.shape[:2] == ((HEIGHT, WIDTH) if a else (WIDTH, HEIGHT))
    corners = {(x, y): (a * x + c * y, b * x + d * y) for x, y in colours}
    left, top = (min(at[axis] for at in corners.values()) for axis in (0, 1))
    for corner, (x, y) in corners.items():
        row = (y - top) * (shown.shape[0] - 16) + 8
        column = (x - left) * (shown.shape[1] - 16) + 8
        assert np.abs(shown[row, column].astype(int) - colours[corner]).max() < 40, corner
    (stored,) = (simplejpeg.decode_jpeg(file) for file in take(data, upright=False).files)
    assert np.abs(stored[8, 8].astype(int) - (255, 0, 0)).max() < 40


@pytest.mark.parametrize("colours", [None, "ITU601", "ITU709"])
def test_colours_are_read_by_the_standard_that_the_file_names(tmp_path: Path, colours: str | None) -> None:
    """JPEG at quality 95 without subsampling: a flat frame differs from what the codec kept by few levels."""
    frame = np.full((HEIGHT, WIDTH, 3), (200, 40, 60), np.uint8)
    (file,) = take(write_clip(tmp_path / "clip.mp4", [frame], colours=colours)).files
    assert np.abs(simplejpeg.decode_jpeg(file).astype(int) - (200, 40, 60)).max() <= 6
    assert simplejpeg.decode_jpeg_header(file)[3] == "444"


def test_sound_alone_has_no_frames(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 0, sound=True)
    assert refused(clip) == "video_no_frames: streams of audio"
    assert len(take(write_clip(tmp_path / "both.mp4", 20, sound=True)).files) == 8


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("front", [False, True], ids=["index-behind", "index-in-front"])
def test_cut_files_are_damaged(tmp_path: Path, suffix: str, front: bool) -> None:
    options = {"movflags": "faststart"} if front and suffix in (".mp4", ".mov") else {}
    data = write_clip(tmp_path / f"clip{suffix}", 20, **options).read_bytes()
    for share in (0.2, 0.6, 0.9, 0.999):
        assert refused(data[: int(len(data) * share)]).startswith("video_damaged: "), share
    assert refused(data[:12]).startswith("video_damaged: ")


def test_damage_between_the_ends(tmp_path: Path) -> None:
    data = bytearray(write_clip(tmp_path / "clip.mp4", 20, codec="mpeg4", gop=20).read_bytes())
    middle = data.index(b"mdat") + 600
    data[middle : middle + 200] = bytes(200)
    assert refused(bytes(data)).startswith("video_damaged: ")


def test_files_that_are_no_videos_are_not_given_to_ffmpeg(tmp_path: Path) -> None:
    """A playlist names other files: a pipe would keep whoever opens it waiting."""
    write_clip(tmp_path / "other.mp4")
    os.mkfifo(tmp_path / "pipe.ts")
    for text in (
        "<!DOCTYPE html><html>404</html>",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\npipe.ts\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile other.mp4\n",
        f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/pipe.ts\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        "\x00",
    ):
        assert refused(text.encode()).startswith("video_format: it begins with ")


def test_random_damage_is_said_with_a_reason(tmp_path: Path) -> None:
    random = Random(0)
    files = [write_clip(tmp_path / f"clip{suffix}", 20).read_bytes() for suffix in CODECS]
    outcomes = set()
    for _ in range(200):
        data = bytearray(random.choice(files))
        for _ in range(random.choice((1, 2, 5, 30))):
            at = random.randrange(len(data) - 4)
            data[at : at + 4] = random.choice((b"\xff" * 4, bytes(4), random.randbytes(4)))
        try:
            outcomes.add("taken" if take(bytes(data)).files else "nothing")
        except SkipRow as skip:
            assert skip.reason in REASONS
            outcomes.add(skip.reason)
    assert {"taken", "video_damaged"} <= outcomes and "nothing" not in outcomes


def test_an_empty_file() -> None:
    assert refused(b"") == "image_empty: it has 0 bytes"


def test_codecs_that_are_not_taken(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.avi", 3, codec="ffv1")
    assert refused(clip).startswith("video_format: its codec is ffv1, which is none of ")


def test_sizes_are_looked_at_before_anything_is_decoded(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    data = clip.read_bytes()
    assert len(extract_frames(data, count=8, max_pixels=WIDTH * HEIGHT).files) == 8
    with pytest.raises(SkipRow, match=r"^image_too_large: frames of 64x48, more than 3071 pixels"):
        extract_frames(data, count=8, max_pixels=WIDTH * HEIGHT - 1)
    # The head of WebM says 64x48, and that of the frame itself 16383x16383.
    huge = bytearray(write_clip(tmp_path / "clip.webm", 1, codec="libvpx").read_bytes())
    at = huge.index(b"\x9d\x01\x2a") + 3
    huge[at : at + 4] = (16383).to_bytes(2, "little") * 2
    assert refused(bytes(huge)).startswith("video_damaged: ")


def test_hours_of_few_frames_are_quick(tmp_path: Path) -> None:
    hour = 3_600_000
    clip = write_clip(tmp_path / "clip.mkv", 12, times_ms=[step * hour for step in range(12)])
    began = time.monotonic()
    taken = take(clip)
    assert time.monotonic() - began < 2
    assert [number_of(file) for file in taken.files] == [0, 1, 3, 4, 6, 7, 9, 11]
    assert taken.times[-1] == 11 * 3600


def test_key_frames_too_far_apart(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 1005, gop=100_000, coding={"sc_threshold": "0", "bf": "0"})
    message = "video_too_long: 1004 frames have to be decoded for one frame: key frames are too far apart"
    assert refused(clip, 2) == message
    assert len(take(clip, 8).files) == 8  # 143 for each


def test_only_what_is_needed_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_eve.data.sources import frames

    given: list[Any] = []
    take_frames = frames._FrameSelector.take

    def counting(selector: frames._FrameSelector, decoded: Sequence[Any]) -> Iterator[Any]:
        given.extend(decoded)
        return take_frames(selector, decoded)

    monkeypatch.setattr(frames._FrameSelector, "take", counting)
    assert len(take(write_clip(tmp_path / "clip.mp4", 200, codec="mpeg4", gop=10)).files) == 8
    assert 8 <= len(given) <= 8 * 11


def test_without_pyav_a_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 2).read_bytes()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"the input has videos, and PyAV, .*: pip install av$"):
        take(clip)


def test_pyav_is_imported_for_videos_alone() -> None:
    program = (
        "import sys, megatron_eve.data.preprocessing.preprocess\n"
        "import megatron_eve.data.sources.llava, megatron_eve.data.sources.webdataset\n"
        "assert 'av' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
