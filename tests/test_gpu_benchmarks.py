"""Benchmarks at toy size, those for GPUs above all: no machine they were made for must find a typo in them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hf.conftest import exported as exported  # the fixture

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = {
    "gpu_smoke.py": ("result | passed", "machine.md", "smoke-test.md"),
    "gpu_step.py --steps 1": ("stage 3, HD", "training-steps.md"),
    "gpu_published_way.py --steps 1": ("ours", "the-published-way-and-ours-4-samples.md"),
    "gpu_profile.py": ("backward", "kernels-of-a-training-step.md", "parts-of-a-training-step.md"),
    "gpu_fp8.py --steps 1 --losses 2": ("--fp8-format", "fp8-steps.md", "fp8-losses-of-2-steps.md"),
    "gpu_variants.py --steps 1": ("--transformer-impl local", "one-choice-at-a-time.md"),
    "decoding.py --images 4 --rounds 1": ("published", "decoding.md"),
    "experts.py --steps 1": ("| decoder | published blending |", "experts-by-rows.md"),
    "preprocessing.py --rounds 1": (
        "| open_images |",
        "preprocessing-start.md",
        "preprocessing-sources.md",
        "preprocessing-image-storage.md",
        "preprocessing-cpu-of-the-parent.md",
    ),
    "tokenizing.py": ("| bfloat16 | 6 |", "codes-of-pictures.md"),
    "evaluation.py": ("| scoring |", "planning-and-scoring.md"),
    "large_sources.py": ("| tar, 50 members | whole |", "large-sources.md"),
}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}


@pytest.mark.slow
@pytest.mark.parametrize("command", BENCHMARKS)
def test_a_benchmark_runs_as_a_toy(command: str, tmp_path: Path) -> None:
    name, *options = command.split()
    words = [sys.executable, f"benchmarks/{name}", *options, "--toy", "--out", str(tmp_path)]
    found = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
    assert found.returncode == 0, found.stderr[-3000:]
    text, *files = BENCHMARKS[command]
    assert text in found.stdout
    for file in files:
        assert (tmp_path / file).read_text(encoding="utf-8").startswith("## ")


@pytest.mark.slow
def test_both_tools_answer_in_turns(exported: Path) -> None:
    pytest.importorskip("lmms_eval")
    words = [sys.executable, "benchmarks/evaluation.py", "--toy", "--model-path", str(exported)]
    found = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
    assert found.returncode == 0, found.stderr[-3000:]
    one, other = [line.split(" | ") for line in found.stdout.splitlines() if line.startswith("| 1 | ")]
    assert [one[1], other[1]] == ["generate.py", "evaluate.py"]
    assert one[2] == other[2] and int(one[2]) > 8  # as many tokens: the same questions
    assert "Medians: " in found.stdout


def test_all_of_them_are_run_and_a_failure_is_told(tmp_path: Path) -> None:
    """By a placeholder for the interpreter, which writes down what it is asked for and fails at one of them."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncase "$1" in *profile*) exit 3;; esac\n')
    python.chmod(0o755)
    words = ["bash", "benchmarks/gpu_all.sh"]
    out = tmp_path / "results"
    found = subprocess.run(
        words,
        cwd=ROOT,
        env=environment(PYTHON=str(python), OUT=str(out)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 1 and "failed: gpu_profile.py (status 3)" in found.stderr
    asked = (tmp_path / "asked").read_text(encoding="utf-8").splitlines()
    assert [line.split()[0] for line in asked] == [
        f"benchmarks/{name}" for name in (
            "gpu_smoke.py", "gpu_step.py", "gpu_published_way.py", "gpu_fp8.py", "gpu_profile.py", "gpu_variants.py",
            "decoding.py", "experts.py",
        )
    ]  # fmt: skip
    assert all(f"--out {out}" in line for line in asked) and out.is_dir()


def test_real_sizes_want_a_gpu() -> None:
    words = [sys.executable, "benchmarks/gpu_step.py"]
    found = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert found.returncode != 0 and "needs a CUDA GPU" in found.stderr
