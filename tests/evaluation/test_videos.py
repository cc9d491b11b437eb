"""MSVD-QA and MSRVTT-QA: which frames are shown, and videos that are missing or damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.evaluation.requests import Request
from tests.data.clips import number_of
from tests.evaluation import toy_data
from tests.evaluation.hub_folder import write_split

pytest.importorskip("lmms_eval")
from megatron_eve.evaluation.vision_harness import VisionHarness

MSVD = Path("GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA")


def frames(request: Request) -> list[int]:
    """The numbers that the pictures of a request show."""
    assert request.conversation is not None
    shown = request.conversation()
    (turn,) = shown.turns
    assert turn.text == request.context  # the engine puts the pictures in front
    return [number_of(image) for image in shown.images]


@pytest.mark.parametrize("task", ["vila_u_msvd_qa", "vila_u_msrvtt_qa"])
def test_eight_frames_from_the_first_to_the_last(task: str, tmp_path: Path) -> None:
    """Of 16 frames numbers 0, 15 / 7, 30 / 7, ... 15, as VILA takes them; of five all five."""
    toy_data.videos(tmp_path / "root")
    long, short, again = VisionHarness(tmp_path / "root").plan(task, tmp_path / "copies")
    assert frames(long) == frames(again) == [0, 2, 4, 6, 8, 10, 12, 15]
    assert frames(short) == [0, 1, 2, 3, 4]


def test_a_video_that_cannot_be_shown_costs_its_questions(tmp_path: Path) -> None:
    root = tmp_path / "root"
    toy_data.videos(root)
    folder = root / MSVD
    (folder / "videos" / "short.avi").write_bytes((folder / "videos" / "long.avi").read_bytes()[:700])
    names = ["long", "short", "elsewhere", "../videos/long.avi", "a\0b"]
    rows = [{"question_id": name, "question": "what?", "answer": "x", "video_name": name} for name in names]
    write_split(folder, "test", rows)
    first, *others = VisionHarness(root).plan("vila_u_msvd_qa", tmp_path / "copies")
    assert len(frames(first)) == 8
    for request, reason in zip(others, ["video_", *["image_missing"] * 3], strict=True):
        assert request.conversation is not None
        with pytest.raises(SkipRow, match=f"^{reason}"):
            request.conversation()


def test_a_dataset_without_its_videos(tmp_path: Path) -> None:
    toy_data.videos(tmp_path)
    shutil.rmtree(tmp_path / MSVD / "videos")
    with pytest.raises(
        DataError, match=r"has no folder GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA/videos: copy the videos"
    ):
        VisionHarness(tmp_path).plan("vila_u_msvd_qa", tmp_path / "copies")


def test_a_label_that_is_empty(tmp_path: Path) -> None:
    from megatron_eve.evaluation.answers import Answered

    toy_data.videos(tmp_path)
    rows = [{"question_id": 7, "question": "what?", "answer": " ", "video_name": "long"}]
    write_split(tmp_path / MSVD, "test", rows)
    harness = VisionHarness(tmp_path)
    (request,) = harness.plan("vila_u_msvd_qa", tmp_path / "copies")
    with pytest.raises(
        DataError, match=r"^vila_u_msvd_qa, question 7: the label is ' '; write the answer as text"
    ):
        harness.score("vila_u_msvd_qa", tmp_path / "copies", {request.key: Answered("x")})
