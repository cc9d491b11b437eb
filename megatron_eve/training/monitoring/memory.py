"""Memory of training in bytes: weights, gradient buffers and optimizer state; and a rank's peak of all its memory."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_eve.runtime.accelerator import accelerator

# Adam's two moments and, beside bfloat16 weights, the master weight: float32 each.
_MOMENTS, _MASTER = 8, 4


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes on one rank.

    Attributes:
        weights: all parameters, frozen ones too; no buffers.
        gradients: DDP's buffers of the trained ones, which a step reduces over the data-parallel ranks.
        optimizer: Adam's moments and master weights, this rank's shard of them.
    """

    weights: int
    gradients: int
    optimizer: int


def training_bytes(chunks: Sequence[DistributedDataParallel], optimizer: Any, bf16: bool) -> TrainingBytes:
    """Memory of this rank. Works also before the first step, in which the optimizer allocates its state.

    Args:
        chunks: this rank's model chunks, in DDP.
        optimizer: megatron-core's.
        bf16: the run keeps float32 master weights.
    """
    shard = [p for group in optimizer.param_groups for p in group["params"]]
    # What trains in float32 also with bf16 is its own master weight: the optimizer has views of it.
    own = {p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()}
    copies = [p for p in shard if bf16 and p.untyped_storage().data_ptr() not in own]
    return TrainingBytes(
        weights=sum(p.nbytes for chunk in chunks for p in chunk.parameters()),
        gradients=sum(buffer.grad_data.nbytes for chunk in chunks for buffer in chunk.buffers),
        optimizer=sum(p.numel() for p in shard) * _MOMENTS + sum(p.numel() for p in copies) * _MASTER,
    )


def checkpoint_bytes(parameters: int, trained: int, bf16: bool) -> int:
    """Approximate size of a checkpoint on disk, in bytes.

    Args:
        parameters, trained: number of parameters of the whole model, and of those that train.
        bf16: the weights are in bfloat16.
    """
    # Master weights are saved in both cases.
    return parameters * (2 if bf16 else 4) + trained * (_MOMENTS + _MASTER)


def peak_memory() -> int:
    """Most bytes that this rank has held since it started: allocated on its GPU or, on CPUs, its resident set size."""
    if accelerator().name == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
