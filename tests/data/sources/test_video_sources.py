"""Videos through preprocessing: conversations, tar shards and files of their own, in every storage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet

from megatron_eve.data.batch import build_batch
from megatron_eve.data.errors import DataError
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig
from megatron_eve.data.schema import Record, VideoFile
from megatron_eve.data.sources.frames import extract_frames
from megatron_eve.data.sources.recognise import open_source
from megatron_eve.data.text.conversation import IMAGE_TOKEN_ID
from tests.data.clips import HEIGHT, WIDTH, number_of, numbered, turned, write_clip
from tests.data.helpers import ROOT, MakeConfig, encoded, opened, picture, run, skipped_rows, turns
from tests.data.sources.test_webdataset import member, write_tar

EIGHT = [0, 2, 5, 8, 10, 13, 16, 19]  # of 20 frames
SIZES = {"image_size": 224, "teacher_size": 112}


def frames_of(config: PreprocessConfig) -> list[int]:
    """The numbers that the pictures of a dataset of encoded files say, in their order."""
    dataset = opened(config)
    return [number_of(dataset.image_bytes(image)) for image in range(dataset.info.num_images)]


def meta_of(config: PreprocessConfig) -> list[dict[str, Any]]:
    return [
        json.loads(text)
        for text in parquet.read_table(config.output_prefix + "_meta.parquet")["meta"].to_pylist()
    ]


def bins(config: PreprocessConfig) -> tuple[bytes, bytes]:
    prefix = config.output_prefix
    return Path(prefix + "_text.bin").read_bytes(), Path(prefix + "_image.bin").read_bytes()


@pytest.fixture
def clip(tmp_path: Path) -> bytes:
    """`photos/clip.mp4`, 20 frames in 2 seconds."""
    (tmp_path / "photos").mkdir(exist_ok=True)
    return write_clip(tmp_path / "photos" / "clip.mp4").read_bytes()


@pytest.mark.parametrize("question", [
    "<video>\nWhat happens?", "What happens?\n<video>", "<image>\nWhat happens?", "What happens?",
    "<video>What happens?",
])  # fmt: skip
def test_a_conversation_has_its_frames_in_front_of_the_first_question(
    make_config: MakeConfig, tmp_path: Path, clip: bytes, question: str
) -> None:
    """The very dataset that the frames make as pictures, wherever their place was written."""
    row = {"id": "a", "video": "clip.mp4", "conversations": turns(question, "Bars move.", "Fast?", "No.")}
    config = make_config([row], template="vicuna_v1")
    info = run(config)
    assert (info.num_samples, info.num_images, info.skipped) == (1, 8, {})
    assert frames_of(config) == EIGHT
    assert meta_of(config) == [
        {
            "video": "clip.mp4",
            "video_duration": 2.0,
            "video_frame_times": [0.0, 0.2, 0.5, 0.8, 1.0, 1.3, 1.6, 1.9],
        }
    ]
    names = [f"frame{number}.jpg" for number in range(8)]
    for name, file in zip(names, extract_frames(clip, count=8, max_pixels=1 << 20).files, strict=True):
        (tmp_path / "photos" / name).write_bytes(file)
    asked = "<image>\n" * 8 + "What happens?"
    same = {"id": "a", "image": names, "conversations": turns(asked, "Bars move.", "Fast?", "No.")}
    other = make_config([same], template="vicuna_v1", output_prefix=str(tmp_path / "same"))
    run(other)
    assert bins(config) == bins(other)


def test_a_conversation_of_a_video_as_a_caption(make_config: MakeConfig, clip: bytes) -> None:
    """`plain` drops the question, and keeps all frames."""
    rows = [{"videos": ["clip.mp4"], "conversations": turns("<video>\nDescribe.", "Bars move.")}]
    config = make_config(rows, video_frames=3)
    run(config)
    tokens, labels = opened(config).text(0)
    assert tokens[:4].tolist() == [1, *[IMAGE_TOKEN_ID] * 3]
    assert (labels[:4] == -100).all() and (labels[4:] == tokens[4:]).all() and len(tokens) > 6
    assert frames_of(config) == [0, 9, 19]


def test_a_row_with_pictures_keeps_them(make_config: MakeConfig, tmp_path: Path, clip: bytes) -> None:
    """As before there were videos: the video is a key like any other."""
    row = {"image": "ok.jpg", "conversations": turns("<image>\nWhat?", "A slope.")}
    config = make_config([row | {"video": "clip.mp4"}], template="vicuna_v1")
    run(config)
    other = make_config([row], template="vicuna_v1", output_prefix=str(tmp_path / "same"))
    run(other)
    assert bins(config) == bins(other)
    assert meta_of(config) == [{"video": "clip.mp4"}]


def test_conversations_that_are_left_out(make_config: MakeConfig, tmp_path: Path, clip: bytes) -> None:
    (tmp_path / "photos" / "frames").mkdir()
    (tmp_path / "photos" / "lfs.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "clip.mp4").write_bytes(clip)
    (tmp_path / "photos" / "link.mp4").symlink_to(tmp_path / "clip.mp4")
    asked = turns("<video>\nWhat?", "Bars.")
    names = {
        "image_missing": "no.mp4",
        "image_not_a_file": "frames",
        "image_lfs_pointer": "lfs.mp4",
        "video_format": "ok.jpg",
    }
    rows: list[dict[str, Any]] = [{"video": name, "conversations": asked} for name in names.values()]
    rows += [{"video": name, "conversations": asked} for name in ("../clip.mp4", "/clip.mp4", "link.mp4")]
    rows += [{"video": ["clip.mp4", "b.mp4"], "conversations": asked}]
    rows += [{"video": "clip.mp4", "audio": "clip.wav", "conversations": asked}]
    rows += [{"video": "clip.mp4", "conversations": turns("<video1>\nWhat?", "Bars.")}]
    rows += [{"video": "clip.mp4", "conversations": turns("What?", "<image>Bars.")}]
    rows += [{"video": "clip.mp4", "conversations": bad} for bad in (None, ["<video>"], [{"from": "human"}])]
    rows += [{"video": "clip.mp4", "conversations": asked}]
    config = make_config(rows, template="vicuna_v1")
    info = run(config)
    reasons = [row["reason"] for row in skipped_rows(config)]
    assert reasons == [
        *names, *["image_outside_root"] * 3, "video_field", "other_media", "other_placeholder", "image_count",
        "no_conversation", "no_conversation", "value_not_text",
    ]  # fmt: skip
    assert [row["image"] for row in skipped_rows(config)][:2] == ["no.mp4", "frames"]
    assert (info.num_samples, info.num_images) == (1, 8)


def test_videos_by_name_need_a_folder(make_config: MakeConfig) -> None:
    config = make_config([{"video": "clip.mp4", "conversations": turns("What?", "Bars.")}], image_root=None)
    message = r"data.json, row 1 names the video clip.mp4: give its folder as --image-root"
    with pytest.raises(DataError, match=message):
        run(config)
    for count in (0, 10_001):
        with pytest.raises(DataError, match=f"--video-frames {count}: use 1 to 10000"):
            run(make_config([], video_frames=count))


def test_opting_out_of_a_video_by_its_sha256(make_config: MakeConfig, tmp_path: Path, clip: bytes) -> None:
    import hashlib

    (tmp_path / "out.txt").write_text(hashlib.sha256(clip).hexdigest())
    other = write_clip(tmp_path / "photos" / "other.mp4", 5)
    rows = [{"video": name, "conversations": turns("?", "Bars.")} for name in ("clip.mp4", other.name)]
    config = make_config(rows, opt_out=str(tmp_path / "out.txt"))
    assert run(config).skipped == {"opted_out": 1}
    assert frames_of(config) == [0, 1, 2, 3, 4]


def test_shards_of_video2dataset(tmp_path: Path, make_config: MakeConfig, clip: bytes) -> None:
    about = {
        "url": "https://x/0.mp4",
        "caption": "bars",
        "key": "00000_0",
        "status": "success",
        "duration": 2,
    }
    failed = json.dumps({"key": "0_2", "status": "failed_to_download", "error_message": "403"})
    thumbnail = encoded(picture(40, 30), "JPEG")
    webm = write_clip(tmp_path / "b.webm", 5).read_bytes()
    shard = write_tar(
        tmp_path / "00000.tar",
        member("00000_0.mp4", clip), member("00000_0.txt", b"Bars move."),
        member("00000_0.json", json.dumps(about).encode()),
        member("00000_1.jpg", thumbnail), member("00000_1.webm", webm), member("00000_1.txt", b"Few bars."),
        member("00000_2.json", failed.encode()), member("00000_2.mp4", b""),
        member("00000_3.mp4", clip), member("00000_3.mkv", clip), member("00000_3.txt", b"Two videos."),
        member("00000_4.m4a", b"sound"), member("00000_4.txt", b"No video."),
        member("00000_5.jpg", thumbnail), member("00000_5.txt", b"A picture."),
        member("00000_6.mp4", clip[:900]), member("00000_6.txt", b"Half."),
    )  # fmt: skip
    source = open_source([str(shard)], None, None)
    record = source.record(next(iter(source.rows())))
    assert record == Record(
        id="00000_0",
        source=f"{tmp_path.name}/00000.tar",
        kind="pair",
        images=[],
        turns=[{"from": "gpt", "value": "Bars move."}],
        meta={"url": "https://x/0.mp4", "duration": 2},
        video=VideoFile(clip, "00000_0.mp4"),
    )
    config = make_config([], input=str(shard), image_root=None, template="document")
    info = run(config)
    assert (info.num_samples, info.num_images) == (3, 14)
    assert [(row["id"], row["reason"]) for row in skipped_rows(config)] == [
        ("00000_2", "download_failed"), (None, "key_twice"), (None, "key_without_picture"),
        ("00000_6", "video_damaged"),
    ]  # fmt: skip
    dataset = opened(config)
    assert dataset.text(0)[0][:10].tolist() == [1, *[IMAGE_TOKEN_ID] * 8, dataset.text(0)[0][9]]
    numbers = [number_of(dataset.image_bytes(image)) for image in range(13)]
    assert numbers == [*EIGHT, 0, 1, 2, 3, 4]
    assert dataset.image_bytes(13) == thumbnail
    assert meta_of(config)[0]["video_frame_times"][-1] == 1.9 and meta_of(config)[0]["url"] == about["url"]


REASONS_OF_CLIPS = {
    "x_cut": "video_damaged",
    "x_empty": "image_empty",
    "x_large": "image_too_large",
    "x_one_key": "video_too_long",
    "x_page": "video_format",
    "x_playlist": "video_format",
    "x_sound": "video_no_frames",
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of clips of all kinds, good and bad (x_*), each with a caption."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "a.mp4", 20, sound=True)
    write_clip(folder / "b.webm", 5)
    write_clip(folder / "c.mkv", 12, times_ms=[n * 3_600_000 for n in range(12)])
    (folder / "d.mov").write_bytes(turned(write_clip(folder / "d.mp4", 3), 0, 1, -1, 0))
    (folder / "d.mp4").unlink()
    write_clip(folder / "e.avi", 9)
    whole = write_clip(folder / "x_cut.mp4", 20).read_bytes()
    (folder / "x_cut.mp4").write_bytes(whole[:1500])
    (folder / "x_empty.mp4").write_bytes(b"")
    (folder / "x_page.mp4").write_text("<html>Not found</html>")
    (folder / "x_playlist.mp4").write_text("#EXTM3U\n#EXTINF:1,\na.mp4\n")
    write_clip(folder / "x_sound.mp4", 0, sound=True)
    write_clip(folder / "x_large.mp4", [np.zeros((240, 320, 3), np.uint8)])
    write_clip(folder / "x_one_key.mp4", 8100, gop=100_000, coding={"sc_threshold": "0", "bf": "0"})
    for file in folder.iterdir():
        file.with_suffix(".txt").write_text(f"It is {file.stem}.")
    return folder


@pytest.mark.parametrize("storage", ["encoded", "jpeg", "pixels"])
def test_video_files_of_all_kinds(make_config: MakeConfig, tmp_path: Path, clips: Path, storage: str) -> None:
    words = tuple(str(clips / f"*.{suffix}") for suffix in ("mp4", "webm", "mkv", "mov", "avi"))
    made = {}
    for workers in (1, 2):
        config = make_config(
            [], input=words, image_root=None, workers=workers, image_storage=storage, max_image_pixels=70_000,
            output_prefix=str(tmp_path / f"set{workers}"), **SIZES,
        )  # fmt: skip
        made[workers] = run(config)
        assert {row["id"]: row["reason"] for row in skipped_rows(config)} == REASONS_OF_CLIPS
    assert made[1].content_sha256 == made[2].content_sha256
    assert (made[1].num_rows, made[1].num_samples, made[1].num_images) == (12, 5, 8 + 5 + 8 + 3 + 8)
    dataset = opened(config)
    batch = build_batch(dataset, range(5), tensor_parallel=1, context_parallel=1, views=["patches"])
    assert len(batch.image_starts) == 32
    sizes = [(int(image["width"]), int(image["height"])) for image in dataset.images]
    flat, tall = (WIDTH, HEIGHT), (HEIGHT, WIDTH)  # those of d.mov
    assert sizes == [flat] * 21 + [tall] * 3 + [flat] * 8


def test_captions_and_metadata_lie_beside_a_video(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("a", "b", "c", "d", "e"):
        write_clip(folder / f"{name}.mp4", 2)
    (folder / "a.txt").write_text("From <image> the text.")
    (folder / "a.json").write_text(
        json.dumps({"caption": "Not this.", "url": "https://x/a", "license": "CC0"})
    )
    (folder / "b.json").write_text(json.dumps({"caption": "From the JSON."}))
    (folder / "c.json").write_text(json.dumps({"status": "failed_to_download", "error_message": "410"}))
    (folder / "d.txt").write_bytes(b"\xff\xfe")
    config = make_config([], input=str(folder / "*.mp4"), image_root=None, drop_license=("by-nc",))
    info = run(config)
    assert {row["id"]: row["reason"] for row in skipped_rows(config)} == {
        "c": "download_failed",
        "d": "text_not_unicode",
        "e": "nothing_to_train",  # a caption is still to be made
    }
    assert (info.num_samples, info.licenses) == (2, {"CC0": 1})
    assert meta_of(config)[0] == {
        "url": "https://x/a", "license": "CC0", "video_duration": 0.2, "video_frame_times": [0.0, 0.1],
    }  # fmt: skip
    table = parquet.read_table(config.output_prefix + "_meta.parquet").to_pydict()
    assert table["id"] == ["a", "b"] and table["source"] == ["clips/a.mp4", "clips/b.mp4"]


@pytest.mark.parametrize(("length", "kept"), [(9, False), (10, True), (11, True)])
def test_frames_and_the_cut_at_model_max_length(
    make_config: MakeConfig, tmp_path: Path, length: int, kept: bool
) -> None:
    """`<s>` and 8 frames are 9 tokens: with fewer than 10 no word of the caption is left."""
    write_clip(tmp_path / "clip.mp4")
    (tmp_path / "clip.txt").write_text("Eight white bars count up on black.")
    for template in ("plain", "document"):
        config = make_config(
            [],
            input=str(tmp_path / "clip.mp4"),
            image_root=None,
            model_max_length=length,
            template=template,
            overwrite=True,
        )
        if not kept:
            with pytest.raises(DataError, match="nothing_to_train"):
                run(config)
            continue
        info = run(config)
        tokens, _ = opened(config).text(0)
        assert (info.num_images, info.num_cut) == (8, 1)
        assert (tokens[1:9] == IMAGE_TOKEN_ID).all()
        assert len(tokens) == length


def test_training_reads_what_the_frames_show(make_config: MakeConfig, tmp_path: Path) -> None:
    """Pictures of 64x48 in 224: the bars of each frame stand in its patches."""
    write_clip(tmp_path / "clip.mp4")
    (tmp_path / "clip.txt").write_text("Bars.")
    config = make_config([], input=str(tmp_path / "clip.mp4"), image_root=None, **SIZES)
    run(config)
    batch = build_batch(opened(config), [0], tensor_parallel=1, context_parallel=1, views=["patches"])
    means = batch.pixels["patches"].unflatten(0, (8, -1)).float().flatten(1).mean(1)
    white = torch.tensor([float(np.mean(numbered(number))) for number in EIGHT])
    assert torch.corrcoef(torch.stack([means, white]))[0, 1] > 0.99


def test_the_command_from_a_shell(make_config: MakeConfig, clips: Path) -> None:
    config = make_config([])
    command = [
        sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(clips / "*.mp4"),
        "--video-frames", "4", "--workers", "1", "--tokenizer-model", config.tokenizer_model, "--output-prefix",
        config.output_prefix,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "rows kept         2 (0 cut" in done.stdout  # black frames of 320x240 too
    assert "images            5" in done.stdout
    assert "x_page, image x_page.mp4: it begins with b'<html>Not fo'" in done.stdout
    assert "Traceback" not in done.stderr and "[mov" not in done.stderr
