"""Machines and packages that are not here, for the doctor to judge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_eve.doctor.packages import EXTENSION, Package, Packages
from megatron_eve.runtime.machine import Gpu, Machine, TorchBuild

H100 = Gpu("NVIDIA H100", 79.6, (9, 0))
A100 = Gpu("NVIDIA A100", 39.5, (8, 0))
ADA = Gpu("NVIDIA L40S", 44.5, (8, 9))
BUILD = TorchBuild(
    "2.10.0+cu128", "12.8", "9.10.2", "2.27.5", ("sm_80", "sm_90", "sm_120"), (H100,) * 8, peers=True
)
NODE = Machine(
    "3.11.9", "python3", "Linux", 96, 2000.0, 1900.0, 1000.0, 500.0, "570.1", (H100,) * 8, torch=BUILD
)
WHOLE = Packages(
    python=">=3.11,<3.14",
    required=(
        Package("torch", "2.10.0+cu128", ">=2.10"),
        Package("megatron-core", "0.16.1", "==0.16.1"),
        Package("transformers", "5.23.0", ">=4.57"),
        Package("psutil", "7.2.2", ">=5.9"),
    ),
    engine=Package("transformer-engine", "2.11.0", ">=2.9.0a0,<2.12.0"),
    flash_attention=Package("flash-attn", "2.8.3"),
    dali=Package("nvidia-dali-cuda120", "2.4.0"),
    triton=Package("triton", "3.6.0"),
    gradio=Package("gradio", None),
    extension=Package(EXTENSION, "of unknown version"),
    apex="NVIDIA",
)


def node(*gpus: Gpu, **torch_differs: Any) -> Machine:
    """The node, with other GPUs or another torch."""
    found = gpus or NODE.driver_gpus
    return replace(NODE, driver_gpus=found, torch=replace(BUILD, **{"gpus": found, **torch_differs}))


def with_required(name: str, **differs: Any) -> Packages:
    return replace(
        WHOLE,
        required=tuple(replace(one, **differs) if one.name == name else one for one in WHOLE.required),
    )


def without(field: str, **differs: Any) -> Packages:
    """The packages, one of them missing or another."""
    package = replace(getattr(WHOLE, field), **({"version": None} | differs))
    return replace(WHOLE, **{field: package})


LOGIN = replace(NODE, driver=None, driver_gpus=(), torch=replace(BUILD, gpus=(), refusal="no driver"))
LAPTOP = replace(LOGIN, torch=TorchBuild("2.13.0+cpu"))


def write(folder: Path, name: str, text: str = "") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
