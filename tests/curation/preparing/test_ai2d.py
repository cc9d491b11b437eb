"""AI2D, from a download with the published names and keys; labels that are drawn on its diagrams."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_eve.curation.preparing.ai2d import Ai2d
from megatron_eve.curation.preparing.choice_labels import draw_labels, read_labels
from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.schema import ImageFile, Record
from tests.curation.preparing.helpers import records, run, skipped
from tests.data.helpers import encoded, picture

DIAGRAM = encoded(picture(120, 80), "PNG")
HUMAN_END = "\nAnswer with the option's letter from the given choices directly."


def question(texts: list[str], right: object, identifier: str, labelled: bool = False) -> dict[str, Any]:
    return {
        "abcLabel": labelled,
        "answerTexts": texts,
        "correctAnswer": right,
        "questionId": identifier,
    }


WHAT = "What is the diagram about?"
WHICH = "Which label is the root?"
QUESTIONS = {
    "0.png": {
        WHAT: question(["Leaves", "Water cycle", "Fish", "{}"], 1, "0.png-0"),
        WHICH: question(["A", "B", "C", "none"], 2, "0.png-1", labelled=True),
        "Which one is X?": question(["A", "B", "X", "C"], 0, "0.png-2", labelled=True),
        "Out of range?": question(["a", "b", "c", "d"], 4, "0.png-3"),
        "No choice?": question(["a", "b", "c", "{}"], 3, "0.png-4"),
        "Negative?": question(["a", "b", "c", "d"], -1, "0.png-5"),
    },
    "5.png": {WHAT: question(["Cats", "Dogs", "Owls", "Rats"], 3, "5.png-0")},
    "12.png": {WHAT: question(["Cats", "Dogs", "Owls", "Rats"], 0, "12.png-0")},
}
ANNOTATIONS = {
    "arrowHeads": {},
    "text": {
        "T0": {"id": "T0", "rectangle": [[10, 10], [40, 30]], "replacementText": "A", "value": "Leaf"},
        "T1": {"id": "T1", "rectangle": [[60, 10], [90, 30]], "replacementText": "B", "value": "Stem"},
        "T2": {"id": "T2", "rectangle": [[60, 50], [90, 70]], "replacementText": "C", "value": "Root"},
        "T3": {"id": "T3", "rectangle": [[10, 60], [40, 60]], "replacementText": "D", "value": "Line"},
    },
}


def write(folder: Path) -> Path:
    """ai2d-all.zip, unpacked, and the list of test pictures."""
    for name in ("questions", "images", "annotations"):
        (folder / "ai2d" / name).mkdir(parents=True)
    for name, questions in QUESTIONS.items():
        content = {"imageName": name, "questions": questions}
        (folder / "ai2d/questions" / f"{name}.json").write_text(json.dumps(content))
        (folder / "ai2d/images" / name).write_bytes(DIAGRAM)
    (folder / "ai2d/annotations/0.png.json").write_text(json.dumps(ANNOTATIONS))
    (folder / "ai2d_test_ids.csv").write_text("5\n1012\n")
    return folder


def test_questions_become_rows_and_those_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    found = run(Ai2d(write(tmp_path / "in")), tmp_path / "out")
    rows = records(tmp_path / "out")
    assert [row.id for row in rows] == ["0.png-0", "0.png-1", "12.png-0"]
    first, second, third = rows
    assert first == Record(
        id="0.png-0",
        source="ai2d",
        kind="conversation",
        images=[ImageFile(DIAGRAM, "ai2d/images/0.png")],
        turns=[
            {
                "from": "human",
                "value": "<image>\nWhat is the diagram about?\nA. Leaves\nB. Water cycle\nC. Fish"
                + HUMAN_END,
            },
            {"from": "gpt", "value": "B"},
        ],
        meta={"image": "0.png", "abcLabel": False, "source_file": "0.png.json"},
    )
    assert second.images[0].path == "0_labels.png"
    assert second.turns == [
        {
            "from": "human",
            "value": "<image>\nWhich label is the root?\nA. A\nB. B\nC. C\nD. none" + HUMAN_END,
        },
        {"from": "gpt", "value": "C"},
    ]
    assert second.meta == {"image": "0.png", "abcLabel": True, "source_file": "0.png.json"}
    assert third.turns[1] == {"from": "gpt", "value": "A"}
    assert skipped(tmp_path / "out") == [
        ("0.png-2", "choice_labels"),  # no rectangle of X
        ("0.png-3", "answer_index"),
        ("0.png-4", "answer_index"),
        ("0.png-5", "answer_index"),
        ("5.png-0", "eval_split"),
    ]
    assert (found.rows_read, found.rows) == (8, 3)


def test_labels_are_drawn_where_the_annotations_say(tmp_path: Path) -> None:
    run(Ai2d(write(tmp_path / "in")), tmp_path / "out")
    drawn = np.asarray(Image.open(BytesIO(records(tmp_path / "out")[1].images[0].data or b"")))
    plain = np.asarray(Image.open(BytesIO(DIAGRAM)))
    outside = np.ones(plain.shape[:2], dtype=bool)
    for left, top in ((10, 10), (60, 10), (60, 50)):
        label = drawn[top : top + 21, left : left + 31]
        outside[top : top + 21, left : left + 31] = False
        assert (label[[0, -1]] == 255).all() and (label[:, [0, -1]] == 255).all()  # white around the letter
        assert (label[3:-3, 8:-8].min(axis=-1) < 64).sum() > 15  # and black inside
    assert (drawn[outside] == plain[outside]).all()
    a, b = drawn[10:31, 10:41], drawn[10:31, 60:91]
    assert (a != b).any()  # another letter


def test_labels_that_cannot_be_read_or_drawn_are_not_taken() -> None:
    labels = read_labels(
        {
            "text": {
                "T0": {"rectangle": [[9, 8], [1, 2]], "replacementText": "a"},
                "T1": {"rectangle": [[1, 1], [9, 1]], "replacementText": "B"},
                "T2": {"rectangle": [[1, 1]], "replacementText": "C"},
                "T3": {"rectangle": [[1, 1], [9, 9]]},
                "T4": {"rectangle": [[1, 1], [9, 9]], "replacementText": 4},
                "T5": None,
            }
        }
    )
    assert {letter: tuple(label) for letter, label in labels.items()} == {"A": ("a", 1, 2, 9, 8)}
    assert read_labels({}) == {}
    with pytest.raises(SkipRow, match=r"image_damaged"):
        draw_labels(DIAGRAM[:60], labels)


def test_without_annotations_the_questions_about_labels_are_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "in")
    (folder / "ai2d/annotations/0.png.json").unlink()
    run(Ai2d(folder), tmp_path / "out")
    assert [record.id for record in records(tmp_path / "out")] == ["0.png-0", "12.png-0"]
    assert ("0.png-1", "choice_labels") in skipped(tmp_path / "out")


def test_the_list_of_test_pictures_is_needed(tmp_path: Path) -> None:
    folder = write(tmp_path / "in")
    (folder / "ai2d_test_ids.csv").unlink()
    with pytest.raises(
        DataError, match=r"has no ai2d_test_ids\.csv, which names .* or add --allow-eval-splits"
    ):
        run(Ai2d(folder), tmp_path / "out")
    run(Ai2d(folder, allow_eval_splits=True), tmp_path / "out")
    assert "5.png-0" in [record.id for record in records(tmp_path / "out")]
    (folder / "ai2d_test_ids.csv").write_text("<html>")
    with pytest.raises(DataError, match="is not a list of numbers, one a line: download it again"):
        run(Ai2d(folder), tmp_path / "other")


def test_a_file_of_another_layout_is_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "in")
    (folder / "ai2d/questions/1.png.json").write_text('{"imageName": "../1.png", "questions": {}}')
    (folder / "ai2d/questions/2.png.json").write_text('{"imageName": "2.png", "questions": {')
    (folder / "ai2d/questions/3.png.json").write_text('{"imageName": "3.png", "questions": {"Q?": 1}}')
    run(Ai2d(folder), tmp_path / "out")
    reasons = [reason for _, reason in skipped(tmp_path / "out")]
    assert reasons.count("questions_layout") == 2 and reasons.count("broken_json") == 1


def test_pictures_that_are_links(tmp_path: Path) -> None:
    folder = write(tmp_path / "in")
    outside = tmp_path / "outside.png"
    (folder / "ai2d/images/0.png").rename(outside)
    (folder / "ai2d/images/0.png").symlink_to(outside)
    run(Ai2d(folder), tmp_path / "out")
    assert [record.id for record in records(tmp_path / "out")] == ["12.png-0"]
    run(Ai2d(folder, follow_links=True), tmp_path / "linked", follow_links=True)
    assert len(records(tmp_path / "linked")) == 3
