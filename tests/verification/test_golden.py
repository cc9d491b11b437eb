"""Golden tensors of the published model, under every layout; and that the tool notices a damaged one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eve.config import ParallelConfig
from tests.golden_dir import find_golden
from tests.layouts import (
    CP2,
    ONE,
    PP2,
    PP2_VPP2,
    PP4,
    TP2,
    TP2_DP2,
    TP2_PP2,
    TP2_SP,
    TP2_SP_CP2,
    Layout,
    parametrize,
)
from tests.ranks import RankPool

TOOL = Path(__file__).parents[2] / "tools" / "verify_golden.py"


def check(folder: Path, parallel: ParallelConfig, recompute: bool = False) -> list[tuple[str, float, bool]]:
    """Runs on each rank."""
    from megatron_eve.verification.run import check_folder

    return [(row.name, row.error, row.ok) for row in check_folder(folder, parallel, recompute)]


def misses(rows: list[tuple[str, float, bool]]) -> list[tuple[str, float, bool]]:
    assert rows, "nothing was compared"
    return [row for row in rows if not row[2]]


@pytest.mark.distributed
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@parametrize(ONE, TP2_SP, PP4, PP2_VPP2, CP2, TP2_PP2, TP2_SP_CP2, slow=(PP2, TP2_DP2))
def test_mini_case(ranks: RankPool, layout: Layout, recompute: bool) -> None:
    rows = ranks.run(layout.world_size, check, find_golden("mini224_mixed"), layout.parallel, recompute)[0]
    assert not misses(rows)
    names = {name for name, _, _ in rows}
    assert {"llm_loss", "clip_loss", "total_loss", "inputs_embeds.1", "logits_rows.3", "pal_pred.2"} <= names
    assert {"pal_teacher.0", "grad.lm_head.weight", "grad.model.vision_tower.patch_embedding.weight"} <= names
    assert (
        "grad.model.vision_tower_compressor.norm_layer.2.1.weight" in names
    )  # the projection of the decoder's input
    assert "pal_pred.1" not in names  # a sample without an image is aligned with nothing
    assert len(rows) == 80


@pytest.mark.distributed
def test_without_the_teacher_the_language_part_is_compared(ranks: RankPool, tmp_path: Path) -> None:
    copy = damaged(find_golden("mini224_mixed"), tmp_path, "llm_loss")
    shutil.rmtree(copy.parent / "_shared" / "openai")
    rows = ranks.run(1, check, copy, ParallelConfig())[0]
    assert [name for name, _, _ in misses(rows)] == ["llm_loss"]
    names = {name for name, _, _ in rows}
    assert "language grad.model.vision_tower.class_embedding" in names
    assert not [name for name in names if name.startswith(("grad.", "pal_", "clip_loss"))]
    assert len(rows) == 52


@pytest.mark.distributed
def test_a_stage_1_case(ranks: RankPool, tmp_path: Path) -> None:
    """Under the freezing of stage 1 the other gradients are the same, bit for bit in the published model."""
    copy = damaged(find_golden("mini224_mixed"), tmp_path, "llm_loss")
    meta = json.loads((copy / "meta.json").read_text())

    def trains(name: str) -> bool:
        return "vision_tower" in name or "mm_projector" in name

    meta["trainable"] = [name for name in meta["trainable"] if trains(name)]
    (copy / "meta.json").write_text(json.dumps(meta))
    outputs = load_file(copy / "outputs.safetensors")
    frozen = [name for name in outputs if name.startswith("grad.") and not trains(name)]
    save_file({name: x for name, x in outputs.items() if name not in frozen}, copy / "outputs.safetensors")
    rows = ranks.run(1, check, copy, ParallelConfig())[0]
    assert [name for name, _, _ in misses(rows)] == ["llm_loss"]
    assert sum(name.startswith("grad.") for name, _, _ in rows) == 36


@pytest.mark.distributed
@parametrize(ONE, TP2_SP, PP2_VPP2, TP2_PP2, CP2)
def test_published_resolution(ranks: RankPool, layout: Layout) -> None:
    rows = ranks.run(layout.world_size, check, find_golden("eve672_square_wide_tall"), layout.parallel)[0]
    assert not misses(rows)


@pytest.mark.distributed
@parametrize(ONE, TP2, PP2, TP2_PP2)
def test_greedy_tokens(ranks: RankPool, layout: Layout) -> None:
    rows = ranks.run(layout.world_size, check, find_golden("generate"), layout.parallel)[0]
    assert not misses(rows)
    assert len(rows) == 12


@pytest.mark.distributed
@parametrize(ONE, TP2_PP2)
def test_greedy_tokens_of_eve2(ranks: RankPool, layout: Layout) -> None:
    """Pictures get their size by the published rule of evaluation."""
    rows = ranks.run(layout.world_size, check, find_golden("eve_v2") / "generate", layout.parallel)[0]
    assert not misses(rows)
    assert [name for name, *_ in rows] == ["a.png: tokens", "b.png: tokens", "text: tokens"]


@pytest.mark.parametrize("name", ["tokenize", "preprocess"])
def test_cases_without_a_model(name: str) -> None:
    assert not misses(check(find_golden(name), ParallelConfig()))


def damaged(folder: Path, tmp_path: Path, tensor: str) -> Path:
    """A copy of a case with a damaged output."""
    copy = tmp_path / "golden" / folder.name
    shutil.copytree(folder.parent / "_shared", copy.parent / "_shared")
    shutil.copytree(folder, copy)
    damage(copy, tensor)
    return copy


def damage(case: Path, tensor: str) -> None:
    """Move one value of an output of a case by one part in ten thousand of the output's norm."""
    outputs = load_file(case / "outputs.safetensors")
    flat = outputs[tensor].flatten()
    flat[0] += max(1e-4 * float(flat.norm()), 1e-4)
    outputs[tensor] = flat.reshape(outputs[tensor].shape)
    save_file(outputs, case / "outputs.safetensors")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("tensor", "row"),
    [
        ("inputs_embeds", "inputs_embeds.0"),
        ("logits_rows", "logits_rows.0"),
        ("llm_loss", "llm_loss"),
        ("grad.lm_head.weight", "grad.lm_head.weight"),
        ("grad.model.vision_tower_compressor.norm_layer.1.0.bias",) * 2,
        ("clip_loss", "clip_loss"),
        ("pal_pred.3", "pal_pred.3"),
        ("pal_teacher.0", "pal_teacher.0"),
        ("pel_local.2", "pel_local.2"),
    ],
)
def test_notices_a_damaged_tensor(ranks: RankPool, tmp_path: Path, tensor: str, row: str) -> None:
    copy = damaged(find_golden("mini224_mixed"), tmp_path, tensor)
    rows = ranks.run(1, check, copy, ParallelConfig())[0]
    assert [name for name, _, _ in misses(rows)] == [row]


def test_notices_a_changed_picture(ranks: RankPool, tmp_path: Path) -> None:
    copy = damaged(find_golden("mini224_mixed"), tmp_path, "llm_loss")
    (copy / "proc" / "0_eve.png").write_bytes((copy / "proc" / "2_eve.png").read_bytes())
    assert "pixels.0.eve" in [name for name, _, _ in misses(ranks.run(1, check, copy, ParallelConfig())[0])]


def test_tool_exits_1_on_a_miss(tmp_path: Path) -> None:
    copy = damaged(find_golden("mini224_mixed"), tmp_path, "llm_loss")
    command = [sys.executable, str(TOOL), str(copy), "--misses-only"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 1, found.stderr
    assert "llm_loss" in found.stdout and "MISS" in found.stdout
    assert "79 of 80 rows within tolerance" in found.stdout


@pytest.mark.slow
def test_tool_passes_over_two_ranks() -> None:
    folder = find_golden("mini224_mixed")
    command = [
        sys.executable,
        str(TOOL),
        str(folder),
        "--tensor-model-parallel-size",
        "2",
        "--sequence-parallel",
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "80 of 80 rows within tolerance" in found.stdout


def test_tool_refuses_an_empty_folder(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, str(TOOL), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert found.returncode != 0
    assert "no golden case" in found.stderr


def test_rows_refuse_not_a_number() -> None:
    from megatron_eve.verification.results import relative

    assert not relative("nan", torch.tensor([float("nan")]), torch.tensor([1.0]), 1.0).ok
    assert not relative("shape", torch.ones(2), torch.ones(3), 1.0).ok
