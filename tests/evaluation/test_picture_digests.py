"""The digest of COCO's pictures, which lie beside the Karpathy split: those that its rows and the shots name."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.answers import Head, check_data
from tests.evaluation import toy_data
from tests.evaluation.hub_folder import picture

pytest.importorskip("lmms_eval")

from megatron_eve.evaluation.harnesses import Harnesses

TEST, SHOTS, ROWS = "coco (split test)", "coco (shots)", "yerevann/coco-karpathy"


def digests(root: Path, task: str) -> dict[str, str]:
    return Harnesses([task], root).check_data(root.parent / "cache")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    toy_data.karpathy(tmp_path / "root")
    return tmp_path / "root"


def test_a_picture_that_is_shown_counts_and_no_other(root: Path) -> None:
    first, shots = digests(root, "vila_coco_karpathy"), digests(root, "vila_coco_karpathy_4shot")
    assert set(first) == {ROWS, TEST} and shots.items() > first.items() and set(shots) == {ROWS, TEST, SHOTS}
    coco = root / "coco"
    (coco / "val2014" / "COCO_val2014_000000000001.jpg").write_bytes(b"no row names it")
    assert digests(root, "vila_coco_karpathy_4shot") == shots

    shown = coco / "val2014" / "COCO_val2014_000000000071.jpg"
    whole = shown.read_bytes()
    shown.write_bytes(whole[:-1] + b"x")  # of the same size
    changed = digests(root, "vila_coco_karpathy_4shot")
    assert {name for name in shots if shots[name] != changed[name]} == {TEST}
    with pytest.raises(DataError, match=r"other files than those in coco \(split test\) of --data-root now"):
        check_data(Head({}, first), changed, Path("answers"))
    shown.unlink()
    assert digests(root, "vila_coco_karpathy")[TEST] not in (first[TEST], changed[TEST])
    shown.write_bytes(whole)
    assert digests(root, "vila_coco_karpathy") == first


def test_of_the_training_pictures_the_four_shots_count(root: Path) -> None:
    before, found = digests(root, "vila_coco_karpathy_4shot"), []
    for path in sorted((root / "coco" / "train2014").iterdir()):
        kept = path.read_bytes()
        path.write_bytes(picture(1)["bytes"])
        after = digests(root, "vila_coco_karpathy_4shot")
        found.append({name for name in before if before[name] != after[name]})
        path.write_bytes(kept)
    assert sorted(found, key=len) == [set(), {SHOTS}, {SHOTS}, {SHOTS}, {SHOTS}]
