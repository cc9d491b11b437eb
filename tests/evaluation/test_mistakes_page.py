"""The page of wrong answers: which ones, with their pictures, and nothing of them runs."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet
import pytest

from megatron_eve.evaluation.answers import Answered
from megatron_eve.evaluation.harnesses import Harnesses
from megatron_eve.evaluation.mistakes import LONGEST_TEXT, write_mistakes
from tests.evaluation import toy_data
from tests.evaluation.hub_folder import write_pope, write_split

pytest.importorskip("lmms_eval")

HOSTILE = "<script>alert(1)</script> & \0 half \ud83d " + "long " * 1_000_000


def test_the_page_has_wrong_answers_alone(tmp_path: Path) -> None:
    folder = write_pope(tmp_path / "root").parent.parent
    rows = pyarrow.parquet.read_table(next(folder.rglob("*.parquet"))).to_pylist()
    rows[4]["image"]["bytes"] = rows[4]["image"]["bytes"][:50]
    write_split(folder, "test", rows)
    harnesses = Harnesses(["eve_pope", "pope"], tmp_path / "root")
    harnesses.check_data(tmp_path / "cache")
    said = {0: "no", 1: "Yes", 2: HOSTILE, 3: "No", 5: "yes"}  # labels no yes no yes no yes
    plan = harnesses.plan()
    found = {
        one.key: Answered(said[one.doc_id])
        if one.doc_id in said
        else Answered(error="image_unreadable: torn")
        for one in plan
    }
    measured, requests = harnesses.score(found)
    page = tmp_path / "new" / "page.html"
    assert write_mistakes(page, 9, measured, requests, found) == ["pope"]
    content = page.read_text(encoding="utf-8")
    assert "eve_pope: 3 of 6 answers are wrong" in content and "<script" not in content
    assert sorted(re.findall(r"</b>test (\d)</pre>", content)) == ["2", "3", "4"]
    assert content.count("data:image/jpeg;base64,") == 2  # the third one's cannot be decoded
    assert "none: image_unreadable: torn" in content and "(image_unreadable: " in content
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; \\0 half \\ud83d long" in content
    assert f" ... ({len(HOSTILE):,} characters)" in content and len(content) < 20 * LONGEST_TEXT
    assert (
        content.count("<b>label</b>yes") == 1 and content.count("<b>asked</b>Is there a thing 3 in the") == 1
    )

    assert write_mistakes(page, 1, measured, requests, found) == ["pope"]
    assert page.read_text(encoding="utf-8").count("<article") == 1


def test_stock_tasks_are_on_the_page_where_they_have_a_number_for_each_question(tmp_path: Path) -> None:
    """scienceqa_img and textvqa_val have one, pope has an object with the answer that it read."""
    toy_data.science_qa(tmp_path / "root")
    toy_data.textvqa(tmp_path / "root")
    write_pope(tmp_path / "root")
    harnesses = Harnesses(["scienceqa_img", "textvqa_val", "pope"], tmp_path / "root")
    harnesses.check_data(tmp_path / "cache")
    said = {"scienceqa_img": ["A", "A", "B"], "textvqa_val": ["stop", "<b>nokia"], "pope": ["no"] * 6}
    found = {one.key: Answered(said[one.task][one.doc_id]) for one in harnesses.plan()}
    assert not any(one.graded for one in harnesses.score(found)[0])
    measured, requests = harnesses.score(found, graded=True)
    page = tmp_path / "page.html"
    assert write_mistakes(page, 9, measured, requests, found) == ["pope"]
    content = page.read_text(encoding="utf-8")
    for task in ("scienceqa_img", "textvqa_val"):
        (one,) = [one for one in measured if one.task == task and one.main]
        points = [point for point, _ in one.graded]
        assert one.value == pytest.approx(sum(points) / len(points)) and 0 < one.value < 1
        wrong = sum(point < 1 for point in points)
        assert f"{task}: {wrong} of {len(points)} answers are wrong" in content
    assert "<b>answer</b>&lt;b&gt;nokia" in content and content.count("data:image/jpeg;base64,") >= 2
    assert "Not on this page: pope; the harness has no number" in content


def test_points_of_each_row_agree_with_the_value(tmp_path: Path) -> None:
    write_pope(tmp_path / "root")
    harnesses = Harnesses(["eve_pope"], tmp_path / "root")
    harnesses.check_data(tmp_path / "cache")
    found = {one.key: Answered("Yes" if one.doc_id < 4 else "not") for one in harnesses.plan()}
    values = {one.metric: one for one in harnesses.score(found)[0]}
    points = [points for points, _ in values["f1"].graded]
    assert points == [0, 1, 0, 1, 1, 0] and values["accuracy"].value == pytest.approx(50)
    assert not values["accuracy"].graded
