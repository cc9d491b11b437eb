"""The picture experiment of `examples/vila_tiny/`: its pictures, its judgement, the whole of it at small size."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from tests.test_commands import ROOT, command

EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]

pytest.importorskip("skimage", reason="make install-dev installs it")

from vila_tiny import shapes  # noqa: E402
from vila_tiny.picture_experiment import RUNS, Pair, exchanged, pairs_of, score  # noqa: E402


def test_pictures_of_coloured_shapes(tmp_path: Path) -> None:
    """A picture shows its colour; held-out combinations are in no seen one; other kinds are other draws."""
    assert len(shapes.SEEN) + len(shapes.HELD_OUT) == len(shapes.ALL) == 16
    drawn = shapes.draw("trained", 24, shapes.SEEN, tmp_path / "a")
    assert [(one.colour, one.shape) for one in drawn] == list(shapes.SEEN) * 2
    again = shapes.draw("trained", 24, shapes.SEEN, tmp_path / "b")
    other = shapes.draw("new", 24, shapes.SEEN, tmp_path / "b")
    for one, same, new in zip(drawn, again, other, strict=True):
        pixels = (tmp_path / "a" / one.name).read_bytes()
        assert pixels == (tmp_path / "b" / same.name).read_bytes()
        assert pixels != (tmp_path / "b" / new.name).read_bytes()
    areas = dict.fromkeys(shapes.SHAPES, 0)
    for colour, shape in shapes.ALL:
        image = shapes.picture(colour, shape, random.Random(0))
        counts = {rgb: count for count, rgb in image.getcolors(shapes.SIDE**2) or ()}
        assert len(counts) == 2 and shapes.COLOURS[colour] in counts, "one colour on one background"
        areas[shape] = counts[shapes.COLOURS[colour]]
    assert areas["square"] > areas["circle"] > areas["cross"] > areas["triangle"]


def test_a_conversation_tells_what_its_pictures_show(tmp_path: Path) -> None:
    drawn = shapes.draw("trained", 24, shapes.SEEN, tmp_path)
    by_name = {one.name: one for one in drawn}
    rows = json.loads(shapes.write_conversations(drawn, tmp_path / "rows.json").read_text())
    assert len(rows) == 48
    for row in rows:
        names = row["image"] if isinstance(row["image"], list) else [row["image"]]
        shown = [by_name[name] for name in names]
        texts = [turn["value"] for turn in row["conversations"]]
        assert texts[0].count("<image>\n") == len(shown) and "<image>" not in "".join(texts[1:])
        texts[0] = texts[0].replace("<image>\n", "")
        answers = dict(zip(texts[::2], texts[1::2], strict=True))
        if len(shown) == 1:
            assert answers == {shapes.COLOUR: shown[0].colour, shapes.SHAPE: shown[0].shape}
        else:
            asked = (shapes.asked_of(ordinal) for ordinal in shapes.ORDINALS)
            assert answers == dict(zip(asked, (one.caption for one in shown), strict=True))


def test_the_judgement() -> None:
    """Right colours and shapes are counted; only answers that follow their pictures are exchanged."""
    red, blue = shapes.Picture("a.png", "red", "square"), shapes.Picture("b.png", "blue", "circle")
    green = shapes.Picture("c.png", "green", "square")
    found = score([(red, "a red square"), (blue, "a red circle"), (red, "a red circle"), (blue, "")])
    assert (found.questions, found.colour, found.shape, found.both) == (4, 0.5, 0.5, 0.25)
    pairs = pairs_of("new", [red, green, blue])
    assert [pair.pictures for pair in pairs] == [(red, blue), (green, blue), (blue, red)]
    pair = Pair(0, "new", (red, blue))
    keys, texts = [key for key, _, _ in pair.questions()], ("a red square", "a blue circle")
    assert [names for _, names, _ in pair.questions()] == [("a.png", "b.png")] * 2 + [("b.png", "a.png")] * 2
    for answers, follows in (
        ((0, 1, 1, 0), True),
        ((0, 1, 0, 1), False),
        ((0, 0, 1, 1), False),
        ((0,) * 4, False),
    ):
        assert exchanged(pair, dict(zip(keys, (texts[i] for i in answers), strict=True))) is follows


@pytest.mark.slow
def test_the_picture_experiment_from_end_to_end(tmp_path: Path) -> None:
    """At a size at which nothing is learnt: all is asked and scored, and grey pictures cannot beat chance."""
    words = ["--output", str(tmp_path / "out"), "--pictures", "48", "--iterations", "30", "--asked", "12"]
    found = command("examples/vila_tiny/picture_experiment.py", *words, timeout=560)
    assert found.returncode == 0, found.stdout + found.stderr
    results = json.loads((tmp_path / "out" / "result.json").read_text())
    assert tuple(results) == RUNS
    for result in results.values():
        assert len(result["scores"]) == 4 + 8
        for name, one in result["scores"].items():
            assert 0 <= one["both"] <= min(one["colour"], one["shape"]) <= 1, name
            if "grey" in name:  # one answer for all, and each colour and shape in a quarter of the pictures
                assert one["colour"] in (0, 0.25) and one["shape"] in (0, 0.25), name
        assert len(result["exchanged"]) == 3 and len(result["grey"]) == 4
    trained = (tmp_path / "out" / "runs" / RUNS[-1] / "losses.jsonl").read_text().splitlines()
    assert json.loads(trained[-1])["lm_loss"] < 2.5
