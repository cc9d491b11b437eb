"""The process groups of a run and of a layout, and the seeds of its ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from megatron_eve.config import ParallelConfig, RunConfig
from megatron_eve.runtime.accelerator import accelerator


def use_deterministic_kernels() -> None:
    """Refuse kernels that add in another order each time; to be called before anything runs on a GPU."""
    # TransformerEngine's attention, cuBLAS and NCCL are told by the environment alone.
    os.environ.update(NVTE_ALLOW_NONDETERMINISTIC_ALGO="0", CUBLAS_WORKSPACE_CONFIG=":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    import torch

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def initialize_distributed(parallel: ParallelConfig) -> None:
    """Join the process group that torchrun describes, or make one of this process alone."""
    import torch

    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    backend = accelerator().backend
    if "RANK" in os.environ:
        torch.distributed.init_process_group(backend, timeout=timeout)
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def initialize_model_parallel(config: RunConfig) -> None:
    """Lay the tensor, pipeline, context and data groups over the ranks and seed them.

    Ranks of one pipeline stage start from one seed, as in Megatron-LM, so replicated weights agree.
    """
    import random

    import numpy as np
    import torch
    from megatron.core import parallel_state, tensor_parallel

    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    seed = config.training.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


@contextmanager
def process_group(parallel: ParallelConfig) -> Iterator[None]:
    """The process group of all ranks; left by a barrier, so that no rank tears down under another."""
    import torch

    initialize_distributed(parallel)
    yield
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@contextmanager
def model_parallel(config: RunConfig) -> Iterator[None]:
    """The groups of one layout, inside `process_group`; another layout may follow in the same process."""
    from megatron.core import parallel_state

    from megatron_eve.models.kernels import forget_kernels, prepare_kernels

    initialize_model_parallel(config)
    prepare_kernels(config)
    try:
        yield
    finally:
        forget_kernels()
        parallel_state.destroy_model_parallel()


@contextmanager
def distributed(config: RunConfig) -> Iterator[None]:
    """Everything a run needs of process groups, for its length."""
    with process_group(config.parallel), model_parallel(config):
        yield
