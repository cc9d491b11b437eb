"""The experiments of `examples/vila_tiny/`: their data, how answers are counted, and both from end to end."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tests.test_commands import ROOT, command

EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]

pytest.importorskip("skimage", reason="make install-dev installs it")

from vila_tiny import grammar, shapes  # noqa: E402
from vila_tiny.runs import Question  # noqa: E402
from vila_tiny.shapes_experiment import Experiment, Rates, verdict  # noqa: E402
from vila_tiny.text_experiment import HELD_OUT, PHOTOS, VARIANTS  # noqa: E402


def test_toy_english_and_sums(tmp_path: Path) -> None:
    """The same texts for the same seed, others for another; sums are right; an animal keeps its adjectives."""
    for name in grammar.TEXTS:
        texts = grammar.write(name, 50, 0, tmp_path / "a")
        assert texts == [json.loads(line)["text"] for line in (tmp_path / "a").read_text().splitlines()]
        assert texts == grammar.write(name, 50, 0, tmp_path / "b")
        assert not set(texts) & set(grammar.write(name, 50, 1, tmp_path / "b"))
        assert all(text.count(".") == grammar.SENTENCES_OF_A_TEXT for text in texts)
    for number in range(200):
        one, plus, other, equals, total = grammar.total(random.Random(number)).rstrip(".").lower().split()
        assert (plus, equals) == ("plus", "is")
        assert grammar.NUMBERS.index(one) + grammar.NUMBERS.index(other) == grammar.NUMBERS.index(total)
        _, adjective, animal, *_ = grammar.sentence(random.Random(number)).split()
        assert [adjective in kind[1] for kind in grammar.KINDS] == [
            animal in kind[0] for kind in grammar.KINDS
        ]


def test_held_out_combinations_have_each_colour_and_each_shape_once(tmp_path: Path) -> None:
    assert {colour for colour, _ in shapes.HELD_OUT} == set(shapes.COLOURS)
    assert sorted(shape for _, shape in shapes.HELD_OUT) == sorted(shapes.SHAPES)
    assert not set(shapes.HELD_OUT) & set(shapes.TRAINED) and len(shapes.TRAINED) == 12
    made = shapes.make(shapes.TRAINED, 2, 0, "a", tmp_path)
    assert set(Counter((one.colour, one.shape) for one in made).values()) == {2}
    for one in made:
        with Image.open(tmp_path / one.file) as picture:
            coloured = Counter(picture.getdata())
        assert 500 < coloured[shapes.COLOURS[one.colour]] < 80 * 80 + 200 and len(coloured) == 2
    drawn = shapes.pairs(made, 20, 0)
    assert len(drawn) == 20 and all(one.answer != other.answer for one, other in drawn)
    first, second = shapes.about(*drawn[0])
    assert first.pictures == second.pictures and (first.right, second.right) == tuple(
        one.answer for one in drawn[0]
    )
    path = shapes.write_conversations([shapes.alone(made)[0], second], tmp_path / "rows.json")
    one, two = json.loads(path.read_text())
    assert one["image"] == made[0].file and two["image"] == list(second.pictures)
    assert two["conversations"][0]["value"].startswith("<image>\n<image>\nWhat does the second")
    assert two["conversations"][1]["value"] == second.right


def test_how_answers_are_counted() -> None:
    asked = [Question([], "", "A red circle."), Question([], "", "A blue cross.")] * 2
    given = ["A red circle.", "A blue square.", "A red", "?"]
    assert Rates.of(asked, given) == Rates(both=0.25, colour=0.75, shape=0.25, count=4)
    trained, new, other = (Rates(both, 1.0, 1.0, 9) for both in (0.75, 0.25, 0.7))
    assert "do not count yet" in verdict(Rates(0.1, 1.0, 1.0, 9), new)
    assert "Of the trained pictures 50% more" in verdict(trained, new) and "memorised" in verdict(
        trained, new
    )
    assert "not memorised" in verdict(trained, other)
    # Of three pairs the first swaps, the second answers the same of both, the third changes to something else.
    straight, swapped = ["a", "b", "a", "a", "a", "b"], ["b", "a", "a", "a", "b", "c"]
    assert Experiment._swaps(straight, swapped) == pytest.approx(1 / 3)


@pytest.mark.slow
def test_the_text_experiment_from_end_to_end(tmp_path: Path) -> None:
    words = ["--output", str(tmp_path / "out"), "--pretraining", "12", "--iterations", "2", "--interval", "1"]
    found = command("examples/vila_tiny/text_experiment.py", *words, timeout=560)
    assert found.returncode == 0, found.stdout + found.stderr
    curves = json.loads((tmp_path / "out" / "result.json").read_text())
    assert list(curves) == [variant.name for variant in VARIANTS]
    starts = set()
    for curve in curves.values():
        assert curve["iterations"] == [0, 1, 2, 3, 4] and set(curve["losses"]) == {*HELD_OUT, PHOTOS}
        assert all(len(losses) == 5 and max(losses) < 20 for losses in curve["losses"].values())
        starts.add(tuple(losses[0] for losses in curve["losses"].values()))
    assert len(starts) == 1, "all begin where stage 1 ended"
    # Stages 2 and 3 changed the decoder, stage 1 did not (the photos' loss changes with the projector).
    language = (tmp_path / "out" / "runs" / "language" / "valid_losses.jsonl").read_text().splitlines()[-3:]
    before = {record["dataset"]: record["lm_loss"] for record in map(json.loads, language)}
    after = dict(zip(curve["losses"], *starts, strict=True))
    assert all(after[name] == pytest.approx(before[name], abs=1e-6) for name in HELD_OUT)
    with Image.open(tmp_path / "out" / "result.png") as picture:
        assert picture.width > 800


@pytest.mark.slow
def test_the_shapes_experiment_from_end_to_end(tmp_path: Path) -> None:
    words = ["--output", str(tmp_path / "out"), "--iterations", "3"]
    found = command("examples/vila_tiny/shapes_experiment.py", *words, timeout=560)
    assert found.returncode == 0, found.stdout + found.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["combinations never seen"]["count"] == 32 and 0 <= result["swapping swaps the answers"] <= 1
    assert result["one of two new pictures"]["count"] == result["the same two, swapped"]["count"] == 64
    assert "| chance" in found.stdout
