"""Golden cases that hold several batches, pictures alone or projectors alone, under every layout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_eve.config import ConfigError, ParallelConfig
from megatron_eve.models.registry import find_family
from megatron_eve.verification.forms import is_case
from tests.golden_dir import find_golden
from tests.layouts import CP2, ONE, PP2, TP2, TP2_PP2, TP2_SP, TP2_SP_CP2, Layout, layout
from tests.ranks import RankPool
from tests.verification.test_golden import TOOL, check, damage, misses

TP4 = layout("TP4", 4, tp=4)
LAYOUTS = (ONE, TP2, TP2_SP, TP4, PP2, CP2, TP2_PP2, TP2_SP_CP2)
# Rows of each case that needs a model: pictures, features, embeddings, logits, losses, gradients, ids and labels.
ROWS = {"vila10_llm": 97, "vila10_grads": 52, "vila15_llm": 50, "vilau_llm_train": 272}
# Cases with packs in which a sample learns the next one's first token.
LEAKING = ("vila10_llm", "vila15_llm")
# What the fast suite runs: every layout, and every case, without and with recomputation.
FAST = {
    ("vila10_llm", ONE, False),
    ("vila10_grads", TP2_SP, True),
    ("vila15_llm", TP2_SP_CP2, True),
    ("vila15_llm", PP2, False),
    ("vilau_llm_train", TP2_PP2, False),
    ("vilau_llm_train", CP2, True),
}


def find(name: str) -> Path:
    return find_golden(f"golden/vila/{name}")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "layout", "recompute"),
    [
        pytest.param(
            case,
            layout,
            recompute,
            id=f"{case}-{layout.name}-{'recomputed' if recompute else 'kept'}",
            marks=() if (case, layout, recompute) in FAST else pytest.mark.slow,
        )
        for case in ROWS
        for layout in LAYOUTS
        for recompute in (False, True)
    ],
)
def test_batches(ranks: RankPool, case: str, layout: Layout, recompute: bool) -> None:
    rows = ranks.run(layout.world_size, check, find(case), layout.parallel, recompute)[0]
    assert not misses(rows)
    names = {name for name, _, _ in rows}
    assert len(names) == len(rows) == ROWS[case]
    # Gradients of such packs are left out.
    assert not [
        name for name in names if name.startswith(("mixed.grad.", "pretrain.grad.")) and case in LEAKING
    ]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout", [ONE, TP2, pytest.param(TP4, marks=pytest.mark.slow)], ids=lambda one: one.name
)
def test_projectors(ranks: RankPool, layout: Layout) -> None:
    rows = ranks.run(layout.world_size, check, find("vila_projectors"), layout.parallel)[0]
    assert not misses(rows)
    assert len(rows) == 66


@pytest.mark.distributed
def test_pictures_alone(ranks: RankPool) -> None:
    rows = ranks.run(1, check, find("vila_preprocess"), ParallelConfig())[0]
    assert not misses(rows)
    assert len(rows) == 30


def damaged(name: str, tmp_path: Path, tensor: str) -> Path:
    """A copy of a case with a damaged output."""
    copy = tmp_path / name
    shutil.copytree(find(name), copy)
    damage(copy, tensor)
    return copy


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("tensor", "row"),
    [
        ("mixed.vision_features", "mixed.vision_features.1.0"),
        ("mixed.image_features", "mixed.image_features.1.0"),
        ("mixed.inputs_embeds", "mixed.inputs_embeds.0"),
        ("mixed.eval.logits", "mixed.logits.0"),
        ("packing_leak.eval_loss_no_packing", "packing_leak.llm_loss"),
        (
            "no_padding.train.grad.mm_projector.layers.2.weight",
            "no_padding.grad.model.mm_projector.2.weight",
        ),
        ("mixed.train.grad.llm.model.norm.weight", None),
    ],
)
def test_notices_a_damaged_tensor(ranks: RankPool, tmp_path: Path, tensor: str, row: str | None) -> None:
    rows = ranks.run(1, check, damaged("vila15_llm", tmp_path, tensor), ParallelConfig())[0]
    assert [name for name, _, _ in misses(rows)] == ([row] if row else [])


def test_a_case_that_lacks_pictures(tmp_path: Path) -> None:
    copy = tmp_path / "vila15_llm"
    shutil.copytree(find("vila15_llm"), copy)
    inputs = load_file(copy / "inputs.safetensors")
    inputs["batch.mixed.images"] = inputs["batch.mixed.images"][:4].clone()
    save_file(inputs, copy / "inputs.safetensors")
    with pytest.raises(ConfigError, match="batch mixed: has 5 placeholders and fewer pictures"):
        find_family("vila").golden().batches(copy)


def test_tokens_for_media(tmp_path: Path) -> None:
    """In NVILA's cases a placeholder is a token, and a line break follows each picture; videos are left out."""
    copy = tmp_path / "vila15_llm"
    shutil.copytree(find("vila15_llm"), copy)
    meta = {"special": {"media_token_ids": {"image": 470, "video": 471}, "newline_ids": [13]}}
    (copy / "meta.json").write_text(json.dumps(meta))
    inputs = load_file(copy / "inputs.safetensors")
    for name, value in inputs.items():
        inputs[name] = value.masked_fill(value == -200, 470) if name.endswith("input_ids") else value
    inputs["batch.packing_leak.input_ids"][0, 5] = 471
    save_file(inputs, copy / "inputs.safetensors")
    batches = {batch.name: batch for batch in find_family("vila").golden().batches(copy)}
    assert set(batches) == {"mixed", "no_padding"}
    texts, (before,) = batches["no_padding"].inputs, inputs["batch.no_padding.input_ids"]
    (ids,), (labels,) = texts["input_ids"], texts["labels"]
    places = (ids == -200).nonzero()[:, 0]
    assert len(places) == 2 and len(ids) == len(before) + 2 and bool(texts["attention_mask"].all())
    assert ids[places + 1].tolist() == [13, 13]
    assert labels[places].tolist() == labels[places + 1].tolist() == [-100, -100]
    kept = [place for place in range(len(ids)) if place - 1 not in places.tolist()]
    assert ids[kept].tolist() == before.masked_fill(before == 470, -200).tolist()


def test_cases_of_other_models_are_none() -> None:
    assert is_case(find("vila10_grads")) and is_case(find("vila_projectors"))
    for name in ("vilau_model",):
        assert not is_case(find(name)), name


@pytest.mark.parametrize(
    "content", [b'{"cases": {', b"\xff\xfe", b"[1]", b"", b"version https://git-lfs.github.com/spec/v1\n"]
)
@pytest.mark.parametrize("case", ["vila_preprocess", "vila15_llm"])
def test_a_damaged_description_is_one_sentence(tmp_path: Path, case: str, content: bytes) -> None:
    copy = tmp_path / case
    shutil.copytree(find(case), copy)
    (copy / "meta.json").write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        check(copy, ParallelConfig())
    told = str(refused.value)
    assert (
        told.startswith(f"{copy}/meta.json: ")
        and told.endswith("; copy the folder again")
        and "\n" not in told
    )


def test_folders_that_nobody_reads_are_named(tmp_path: Path) -> None:
    """Beside cases, by the tool; folders inside a case are parts of it."""
    for name in ("tokenize", "another"):
        shutil.copytree(find_golden("tokenize"), tmp_path / name)
    (tmp_path / "another" / "cases.json").unlink()
    found = subprocess.run(
        [sys.executable, str(TOOL), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    passed_over = [line for line in found.stdout.splitlines() if "passed over" in line]
    assert passed_over == [f"{tmp_path}/another: passed over: holds no golden case that is read here"]
