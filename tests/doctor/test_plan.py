"""What a run would take on machines that are not here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_eve.doctor.packages import EXTENSION, Packages
from megatron_eve.doctor.plan import describe_plan
from megatron_eve.runtime.accelerator import Accelerator
from tests.doctor.machines import A100, ADA, WHOLE, without, write


@pytest.fixture(scope="module")
def prepared() -> None:
    """megatron-core is imported now, lest it remember what it finds in a folder of `modules`."""
    from megatron_eve.runtime.accelerator import accelerator

    accelerator()
    import megatron_eve.models.shapes  # noqa: F401


def accelerator(capability: tuple[int, int] | None, engine: bool = True) -> Accelerator:
    if capability is None:
        return Accelerator("cpu", "gloo", torch.device("cpu"), False)
    return Accelerator("cuda", "nccl", torch.device("cpu"), engine, capability, (12, 9))


def plan(monkeypatch: pytest.MonkeyPatch, machine: Accelerator, packages: Packages = WHOLE) -> dict[str, str]:
    """What a run would take on another machine, by the functions that training asks."""
    for module in ("models.kernels", "models.shapes"):
        monkeypatch.setattr(f"megatron_eve.{module}.accelerator", lambda: machine)
    monkeypatch.setattr("megatron_eve.data.images.backends.dali_is_installed", lambda: True)
    return dict(describe_plan(machine, packages))


def test_the_plan_of_an_h100(prepared: None, monkeypatch: pytest.MonkeyPatch, modules: Path) -> None:
    write(modules, f"{EXTENSION}.py")
    entries = plan(monkeypatch, accelerator((9, 0)))
    assert entries["runs on"] == "GPUs, ranks communicate through nccl"
    assert entries["layers"].startswith("TransformerEngine's")
    assert entries["attention"] == "TransformerEngine's choice: flash-attn 2.8.3 or cuDNN"
    assert [entries[f"FP8 {recipe}"] for recipe in ("delayed", "tensorwise", "blockwise")] == ["yes"] * 3
    assert entries["fused loss te"] == entries["bfloat16"] == "yes"
    assert entries["weight gradients"].endswith("itself in the decoder and the output layer")
    assert entries["images"] == "decoded by dali" and "fixed shapes" in entries["packs"]


def test_the_plan_of_an_a100(prepared: None, monkeypatch: pytest.MonkeyPatch, modules: Path) -> None:
    write(modules, "flash_attn.py")
    entries = plan(monkeypatch, accelerator(A100.capability))
    assert entries["layers"].startswith("TransformerEngine's")
    assert entries["attention"] == "TransformerEngine's choice: flash-attn 2.8.3"
    for recipe in ("delayed", "tensorwise", "blockwise"):
        assert entries[f"FP8 {recipe}"].startswith("no: needs compute capability 8.9")
        assert entries[f"FP8 {recipe}"].endswith("this GPU has 8.0")
    assert entries["fused loss te"] == entries["bfloat16"] == "yes"


def test_the_plan_of_an_ada(prepared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = plan(monkeypatch, accelerator(ADA.capability), without("flash_attention"))
    assert entries["layers"] == "torch's" and entries["attention"] == "torch's, sample by sample"
    assert entries["FP8 delayed"] == entries["FP8 tensorwise"] == "yes"
    assert entries["FP8 blockwise"].startswith(
        "no: needs compute capability 9.0 (Hopper or newer) and CUDA 12.9"
    )


def test_the_plan_of_a_gpu_without_transformer_engine(
    prepared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = plan(monkeypatch, accelerator((9, 0), engine=False))
    assert entries["layers"] == "torch's" and entries["attention"] == "torch's, sample by sample"
    assert entries["FP8 delayed"].startswith("no: ") and entries["fused loss te"].startswith("no: ")


def test_the_plan_of_a_cpu(prepared: None, monkeypatch: pytest.MonkeyPatch, modules: Path) -> None:
    """apex's extension and DALI are no use to it, even where they are."""
    write(modules, f"{EXTENSION}.py")
    entries = plan(monkeypatch, accelerator(None))
    assert entries["runs on"] == "the CPU, ranks communicate through gloo"
    assert entries["layers"] == "torch's" and "(unfused)" in entries["weight gradients"]
    assert entries["images"] == "decoded by threads" and entries["packs"] == "each as long as it is"
