"""What the driver and torch say of GPUs, as if there were some."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_eve.runtime.machine import Gpu, TorchBuild, inspect_machine, parse_driver


def test_what_the_driver_answers() -> None:
    driver, gpus = parse_driver("550.54, 40960, 8.0, NVIDIA A100, 40 GB\n550.54, 81920, 9.0, NVIDIA H100\n")
    assert driver == "550.54"
    assert gpus == (Gpu("NVIDIA A100, 40 GB", 40, (8, 0)), Gpu("NVIDIA H100", 80, (9, 0)))
    assert parse_driver("") == (None, ())
    with pytest.raises(ValueError):
        parse_driver("No devices were found")


def test_what_torch_says_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that pretends: two GPUs, then none because the driver is too old."""
    device = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0)
    for name, value in {
        "version.cuda": "12.8",
        "backends.cudnn.version": lambda: 91002,
        "distributed.is_nccl_available": lambda: True,
        "cuda.nccl.version": lambda: (2, 27, 5),
        "cuda.init": lambda: None,
        "cuda.device_count": lambda: 2,
        "cuda.get_device_properties": lambda number: device,
        "cuda.get_arch_list": lambda: ["sm_90"],
        "cuda.can_device_access_peer": lambda one, other: one < other,
    }.items():
        monkeypatch.setattr(f"torch.{name}", value)
    found = inspect_machine()
    gpus = (Gpu("NVIDIA H100", 80.0, (9, 0)),) * 2
    assert found.gpus == gpus
    assert found.torch == TorchBuild(
        str(torch.__version__), "12.8", "9.10.2", "2.27.5", ("sm_90",), gpus, peers=False
    )

    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\nmore")

    monkeypatch.setattr("torch.cuda.init", refuse)
    build = inspect_machine().torch
    assert build is not None and build.gpus == ()
    assert build.refusal == "The NVIDIA driver on your system is too old"
