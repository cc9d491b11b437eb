"""Golden steps of a published trainer: losses, gradient norms and changes of weights under any layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.golden_dir import find_golden
from tests.layouts import CP2, DP2, ONE, PP2_VPP2, TP2_PP2, TP2_SP, Layout, parametrize
from tests.ranks import RankPool
from tests.verification.test_golden import check, misses

pytestmark = pytest.mark.distributed


def find(name: str) -> Path:
    return find_golden("eve_v2") / name


@parametrize(ONE, TP2_PP2, slow=(TP2_SP, PP2_VPP2, CP2, DP2))
def test_seven_steps_of_three_stages(ranks: RankPool, layout: Layout) -> None:
    rows = ranks.run(layout.world_size, check, find("train_steps"), layout.parallel)[0]
    assert not misses(rows)
    assert len(rows) == 283


@parametrize(ONE, slow=(TP2_PP2,))
def test_text_is_read_as_by_the_plain_language_model(ranks: RankPool, layout: Layout) -> None:
    rows = ranks.run(layout.world_size, check, find("init_copy"), layout.parallel)[0]
    assert not misses(rows)
    assert [name for name, *_ in rows] == [
        f"{model}.{text}.logits.0" for model in ("hf_stage0", "hf_init_copy", "hf_all") for text in (0, 1)
    ]


@pytest.mark.parametrize(
    ("stage", "change", "missed"),
    [
        ("stage0", {"betas": [0.9, 0.95]}, {"loss", "change", "final"}),
        ("stage0", {"weight_decay": 0.1}, {"loss", "grad_norm", "final"}),
        ("stage0", {"eps": 1e-6}, {"change"}),
        ("stage1", {"gradient_clipping": 1.0}, {"loss", "grad_norm", "change", "final"}),
        ("stage1", {"trains": "all"}, {"loss", "grad_norm", "change", "final", "parameters that change"}),
        ("stage2", {"lr": 2.02e-5}, {"loss", "change"}),
    ],
    ids=["beta2", "weight decay", "epsilon", "clipping", "another stage", "learning rate"],
)
def test_another_optimizer_is_noticed(
    ranks: RankPool, tmp_path: Path, stage: str, change: dict[str, Any], missed: set[str]
) -> None:
    copy = tmp_path / "train_steps"
    shutil.copytree(find("train_steps"), copy)
    (tmp_path / "_shared").symlink_to(find("_shared").resolve())
    runs = json.loads((copy / "steps.json").read_text())
    run = runs[stage]
    for name, value in change.items():
        (run if name in run else run["optimizer"])[name] = value
    copy.chmod(0o755)
    (copy / "steps.json").unlink()
    (copy / "steps.json").write_text(json.dumps({stage: run}))
    found = misses(ranks.run(1, check, copy, ONE.parallel)[0])
    assert {name.split(".")[1] for name, *_ in found} >= missed
