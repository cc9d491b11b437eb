"""The text experiment of `examples/vila_tiny/`: its data, and the whole of it at small size."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.test_commands import ROOT, command

EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]

pytest.importorskip("skimage", reason="make install-dev installs it")

from vila_tiny import grammar  # noqa: E402
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
