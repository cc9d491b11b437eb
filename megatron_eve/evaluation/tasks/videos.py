"""Questions about videos, as VILA and VILA-U are evaluated on them: eight frames of each video, and the question alone.

A dataset's folder is the one of Video-LLaVA's evaluation (`GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA`) with its questions in a
parquet file: `video_name` names a file below `videos` or `videos/all`, with or without its ending.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.images import DEFAULT_MAX_PIXELS
from megatron_eve.data.sources.frames import extract_frames
from megatron_eve.data.sources.image_files import read_image_file
from megatron_eve.evaluation.scorers.exact import MatchRow, score_word
from megatron_eve.evaluation.scorers.judged import JudgeRow
from megatron_eve.evaluation.scorers.scores import Reported, answer_of, in_percent

FRAMES = 8
MSVD, MSRVTT = "GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA", "GPT_Zero_Shot_QA/MSRVTT_Zero_Shot_QA"
_PLACES = ("videos", "videos/all")
_ENDINGS = ("", ".mp4", ".avi", ".mov", ".mkv", ".webm")
Document = Mapping[str, Any]

# lmms-eval's functions get one document and nothing else: the folders with the videos, by dataset.
_folders: dict[str, Path] = {}


def _noted(folder: str, dataset: datasets.Dataset) -> datasets.Dataset:
    """Note where the videos are. Called with the data root as working directory.

    Raises:
        DataError: there are none.
    """
    _folders[folder] = Path.cwd() / folder
    if not (_folders[folder] / _PLACES[0]).is_dir():
        raise DataError(
            f"--data-root {Path.cwd()} has no folder {folder}/videos: copy the videos of the dataset there; a link "
            "will do"
        )
    return dataset


msvd = partial(_noted, MSVD)
msrvtt = partial(_noted, MSRVTT)


def question(doc: Document) -> str:
    """The question alone."""
    return str(doc["question"]).strip()


def _messages(folder: str, doc: Document) -> list[dict[str, Any]]:
    """The frames as pictures, JPEG files, in front of the question; fewer than eight of a video that has fewer.

    Raises:
        SkipRow: the video is missing or damaged.
    """
    frames = extract_frames(
        _video(_folders[folder], doc["video_name"]), count=FRAMES, max_pixels=DEFAULT_MAX_PIXELS
    )
    content: list[dict[str, Any]] = [{"type": "image", "url": file} for file in frames.files]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question(doc)}]}]


def _video(folder: Path, name: Any) -> bytes:
    named = str(name)
    for place in _PLACES:
        for ending in _ENDINGS:
            if Path(named).name == named and (folder / place / f"{named}{ending}").is_file():
                return read_image_file(str(folder / place), f"{named}{ending}", follow_links=True)
    raise SkipRow("image_missing", f"no video {named[:100]!r} in {' or '.join(_PLACES)}")


msvd_messages = partial(_messages, MSVD)
msrvtt_messages = partial(_messages, MSRVTT)


def video_row(doc: Document, results: Sequence[str]) -> dict[str, JudgeRow]:
    """A question about a video."""
    row = JudgeRow(doc["question_id"], doc["question"], doc["answer"], answer_of(results))
    return {"accuracy": row}


def _word_match(task: str, rows: Sequence[JudgeRow]) -> Reported:
    matches = [MatchRow(row.id, row.label, row.answer) for row in rows]
    reported = in_percent(score_word(task, matches), matches)
    return replace(reported, judged=tuple(rows))


msvd_accuracy = partial(_word_match, "vila_u_msvd_qa")
msrvtt_accuracy = partial(_word_match, "vila_u_msrvtt_qa")
