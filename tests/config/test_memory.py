"""The memory that a configuration is expected to take, against a model's own parameters."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.config import PRESETS, ParallelConfig, RunConfig, TrainingConfig
from megatron_eve.config.memory import count_parameters, in_units, memory_error, rank_memory
from megatron_eve.models.registry import find_family
from megatron_eve.preflight import main
from megatron_eve.runtime.machine import memory_of_a_rank
from tests.ranks import RankPool


def _parameters(config: RunConfig) -> int:
    """Of a model on torch's meta device."""
    from megatron_eve.convert.meta_model import MetaModel
    from megatron_eve.models.process_groups import model_parallel

    with model_parallel(config):
        return sum(entry.shape.numel() for entry in MetaModel(config).entries)


@pytest.mark.parametrize(
    ("preset", "aligning", "changes"),
    [
        ("eve_mini", True, {}),
        ("eve_tiny", False, {"num_query_groups": 2, "add_qkv_bias": True, "vocab_size": 700}),
        ("eve_7b", True, {}),
    ],
)
@pytest.mark.distributed
def test_every_parameter_is_counted(
    ranks: RankPool, preset: str, aligning: bool, changes: dict[str, Any]
) -> None:
    sizes = PRESETS[preset]
    model = replace(sizes.model, **changes)
    config = RunConfig(model=model, vision=replace(sizes.vision, patch_aligning=aligning))
    counts, others = count_parameters(model), find_family(config.family).parameter_counts(config)
    counted = (
        model.num_layers * counts.layer
        + 2 * counts.embedding
        + counts.norm
        + others.first_stage
        + others.last_stage
    )
    assert [counted] == ranks.run(1, _parameters, config)


def test_the_fullest_rank() -> None:
    """EVE-7B by the arithmetic of docs/operations.md: 6.81e9 parameters over TP 4 x PP 2, then 16 bytes or 18 each."""
    config = RunConfig(
        **PRESETS["eve_7b"]._asdict(),
        parallel=ParallelConfig(tensor_model_parallel_size=4, pipeline_model_parallel_size=2),
        training=TrainingConfig(bf16=True),
    )
    held = rank_memory(config, 16)
    assert held.weights == pytest.approx(2 * 6.81e9 / 8, rel=0.03)
    assert held.gradients == 2 * held.weights and held.optimizer == 6 * held.weights // 2
    alone = rank_memory(replace(config, parallel=ParallelConfig(), training=TrainingConfig()), 1)
    assert alone.total == pytest.approx(16 * 6.81e9, rel=0.01)
    frozen = rank_memory(replace(config, training=TrainingConfig(bf16=True, stage=1)), 16)
    assert frozen.weights == held.weights and frozen.gradients < held.gradients / 10


def test_what_cannot_fit_is_refused() -> None:
    needed = rank_memory(RunConfig(**PRESETS["eve_7b"]._asdict()), 1)
    assert memory_error(needed, 110.0, "one GPU") is None
    error = memory_error(needed, 80.0, "one GPU")
    assert error is not None and "\n" not in error
    assert "needs 100.86 GiB" in error and "a rank has 80.00 GiB (one GPU)" in error
    assert "--tensor-model-parallel-size" in error


def test_the_memory_of_a_toy_is_said_in_mib() -> None:
    assert [in_units(size) for size in (0, 400 * 1024, 2**30 - 2**20, 2**30, 3 * 2**40)] == [
        "0.00 MiB", "0.39 MiB", "1,023.00 MiB", "1.00 GiB", "3,072.00 GiB",
    ]  # fmt: skip
    toy = str(rank_memory(RunConfig(**PRESETS["eve_mini"]._asdict()), 1))
    assert re.fullmatch(
        r"[\d.]+ MiB a rank \(weights [\d.]+ MiB, gradients .*\), activations not counted", toy
    )
    assert "0.00" not in toy


def test_the_memory_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    alone, shared = memory_of_a_rank(1), memory_of_a_rank(4)
    assert alone is not None and shared is not None
    assert 0.5 < alone[0] == pytest.approx(4 * shared[0])
    assert "shared by 4 ranks" in shared[1]


@pytest.mark.parametrize(
    ("torch_version", "hidden", "driver", "what"),
    [
        ("2.13.0+cpu", False, "", "this machine's memory, shared by 2 ranks"),
        ("2.13.0", True, "", "this machine's memory, shared by 2 ranks"),
        ("2.13.0", False, "580.1, 16384, 7.5, Tesla T4", "one Tesla T4"),
        ("2.13.0", False, "", None),  # a login node, say: only the ranks will know
    ],
)
def test_a_look_before_the_start_refuses_only_what_it_knows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    torch_version: str,
    hidden: bool,
    driver: str,
    what: str | None,
) -> None:
    """preflight may run on another machine than the ranks; two of these share a node, as the batch script says."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{driver}'\n" if driver else "#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "" if hidden else "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("megatron_eve.runtime.machine.metadata.version", lambda name: torch_version)
    flags = [
        "--ranks",
        "4",
        "--preset",
        "eve_7b",
        "--num-layers",
        "32000",
        "--mock-data",
        "--train-iters",
        "1",
    ]
    status, told = main(flags), capsys.readouterr().err
    if what is None:
        assert (status, told) == (0, "")
        return
    assert status == 2 and told.count("\n") == 1
    assert told.startswith("error: out of memory before the first step: needs ") and f"({what})" in told
