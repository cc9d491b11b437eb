"""Golden tensors of the published model, under every layout; and that the tool notices a damaged one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eve.config import ParallelConfig
from tests.golden_dir import find_golden
from tests.layouts import ONE, PP2, PP2_VPP2, PP4_VPP2, TP2, TP2_DP2, TP2_PP2, TP2_SP, Layout, parametrize
from tests.ranks import RankPool

TOOL = Path(__file__).parents[2] / "tools" / "verify_golden.py"


def check(folder: Path, parallel: ParallelConfig) -> list[tuple[str, float, bool]]:
    """Runs on each rank."""
    from megatron_eve.verification.run import check_folder

    return [(row.name, row.error, row.ok) for row in check_folder(folder, parallel)]


def misses(rows: list[tuple[str, float, bool]]) -> list[tuple[str, float, bool]]:
    assert rows, "nothing was compared"
    return [row for row in rows if not row[2]]


@pytest.mark.distributed
@parametrize(ONE, TP2, TP2_SP, PP2, PP2_VPP2, TP2_PP2, TP2_DP2, PP4_VPP2)
def test_mini_case(ranks: RankPool, layout: Layout) -> None:
    rows = ranks.run(layout.world_size, check, find_golden("mini224_mixed"), layout.parallel)[0]
    assert not misses(rows)
    names = {name for name, _, _ in rows}
    assert {"llm_loss", "inputs_embeds.1", "logits_rows.3", "language grad.lm_head.weight"} <= names
    assert "language grad.model.vision_tower.patch_embedding.weight" not in names  # given only as a total
    assert len(rows) == 52


@pytest.mark.distributed
@parametrize(ONE, TP2_SP, PP2_VPP2, TP2_PP2)
def test_published_resolution(ranks: RankPool, layout: Layout) -> None:
    rows = ranks.run(layout.world_size, check, find_golden("eve672_square_wide_tall"), layout.parallel)[0]
    assert not misses(rows)


@pytest.mark.distributed
@parametrize(ONE, TP2, PP2, TP2_PP2)
def test_greedy_tokens(ranks: RankPool, layout: Layout) -> None:
    rows = ranks.run(layout.world_size, check, find_golden("generate"), layout.parallel)[0]
    assert not misses(rows)
    assert len(rows) == 12


@pytest.mark.parametrize("name", ["tokenize", "preprocess"])
def test_cases_without_a_model(name: str) -> None:
    assert not misses(check(find_golden(name), ParallelConfig()))


def damaged(folder: Path, tmp_path: Path, tensor: str) -> Path:
    """A copy of a case with one value of one tensor moved by one part in ten thousand of its norm."""
    copy = tmp_path / "golden" / folder.name
    shutil.copytree(folder.parent / "_shared", copy.parent / "_shared")
    shutil.copytree(folder, copy)
    outputs = load_file(copy / "outputs.safetensors")
    flat = outputs[tensor].flatten()
    flat[0] += max(1e-4 * float(flat.norm()), 1e-4)
    outputs[tensor] = flat.reshape(outputs[tensor].shape)
    save_file(outputs, copy / "outputs.safetensors")
    return copy


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("tensor", "row"),
    [
        ("inputs_embeds", "inputs_embeds.0"),
        ("logits_rows", "logits_rows.0"),
        ("llm_loss", "llm_loss"),
        ("grad.lm_head.weight", "language grad.lm_head.weight"),
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
    assert "51 of 52 rows within tolerance" in found.stdout


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
    assert "52 of 52 rows within tolerance" in found.stdout


def test_tool_refuses_an_empty_folder(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, str(TOOL), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert found.returncode != 0
    assert "no golden case" in found.stderr


def test_rows_refuse_not_a_number() -> None:
    from megatron_eve.verification.report import relative

    assert not relative("nan", torch.tensor([float("nan")]), torch.tensor([1.0]), 1.0).ok
    assert not relative("shape", torch.ones(2), torch.ones(3), 1.0).ok
