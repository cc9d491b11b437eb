"""Chooses between CUDA + NCCL and CPU + gloo; no other module decides this.

Everything else asks `accelerator()` for a device and a backend and then runs the same trainer, model,
schedules, optimizer and checkpoints on either.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Accelerator:
    """The hardware and the communication backend of one rank.

    Attributes:
        name: "cuda" or "cpu".
        backend: the `torch.distributed` backend, "nccl" or "gloo".
        device: where this rank's tensors live.
        transformer_engine: True if TransformerEngine imports and a GPU can run it.
        capability: compute capability of the GPU, such as (9, 0) for an H100; None without one.
        cuda: version of CUDA that torch was built with, such as (12, 9); None without a GPU.
    """

    name: str
    backend: str
    device: torch.device
    transformer_engine: bool
    capability: tuple[int, int] | None = None
    cuda: tuple[int, int] | None = None


@cache
def accelerator() -> Accelerator:
    """Choose the accelerator once per process and prepare megatron-core for it.

    Without a GPU this imports `runtime.without_cuda`, which replaces functions of torch and megatron-core in this
    process so that megatron-core runs on CPU tensors. Call it before building anything of megatron-core.

    Raises:
        RuntimeError: on CPU, when the installed megatron-core is not the version the recipe was tested with.
    """
    import os

    import torch

    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise RuntimeError(
                f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}; "
                "start torchrun with --nproc-per-node equal to the number of GPUs"
            )
        torch.cuda.set_device(local_rank)
        major, minor = (torch.version.cuda or "0.0").split(".")[:2]
        return Accelerator(
            "cuda",
            "nccl",
            torch.device("cuda", local_rank),
            _has_transformer_engine(),
            torch.cuda.get_device_capability(),
            (int(major), int(minor)),
        )
    from megatron_eve.runtime import without_cuda

    without_cuda.install()
    return Accelerator("cpu", "gloo", torch.device("cpu"), False)


def _has_transformer_engine() -> bool:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True
