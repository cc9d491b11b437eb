"""The text experiment of `examples/eve2_tiny/`, the whole of it at small size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.test_commands import ROOT, command

EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]

pytest.importorskip("skimage", reason="make install-dev installs it")

from eve2_tiny.text_experiment import EXPERTS, HELD_OUT, PHOTOS, SHARED, VARIANTS, rows_of  # noqa: E402


def test_rows_of_the_table_hold_means_and_ranges() -> None:
    losses = [
        [{**dict.fromkeys(HELD_OUT, value + half), PHOTOS: 9.0} for half in range(3)] for value in (1.0, 2.0)
    ]
    first, *rows = rows_of({"shared weights, no text": losses})
    assert first[0].startswith("losses before")
    assert rows[0] == (
        "shared weights, no text: held_out_sentences",
        "1.500 (1.000 - 2.000)   2.500 (2.000 - 3.000)   3.500 (3.000 - 4.000)",
    )
    assert [name.split(": ")[1] for name, _ in rows] == [*HELD_OUT, PHOTOS]


@pytest.mark.slow
def test_the_text_experiment_from_end_to_end(tmp_path: Path) -> None:
    words = ["--output", str(tmp_path / "out"), "--seeds", "1", "--pretraining", "4", "--iterations", "2"]
    found = command("examples/eve2_tiny/text_experiment.py", *words, timeout=560)
    assert found.returncode == 0, found.stdout + found.stderr
    results = json.loads((tmp_path / "out" / "result.json").read_text())
    assert list(results) == [variant.title for variant in VARIANTS]
    for title, ((before, half, both),) in results.items():
        assert before == results[VARIANTS[0].title][0][0], "all start from one language model"
        changed = [half[name] != before[name] for name in HELD_OUT]
        assert changed == [title.startswith(SHARED)] * 2, "experts leave text as it was"
        assert all(both[name] != half[name] for name in (*HELD_OUT, PHOTOS))
    halves = [seeds[0][1] for title, seeds in results.items() if title.startswith(EXPERTS)]
    assert halves[0] == halves[1] == halves[2]
