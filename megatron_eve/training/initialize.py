"""Start and stop a rank: process groups, seeds, and a failure that does not hang the others."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from megatron_eve.accelerator import accelerator
from megatron_eve.config import ParallelConfig, RunConfig
from megatron_eve.errors import UserError, show_error


def world_size() -> int:
    """Ranks that torchrun started (1 without it), known before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def global_rank() -> int:
    """This process's rank, known before any process group exists."""
    return int(os.environ.get("RANK", "0"))


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

    from megatron_eve.training.kernels import forget_kernels, prepare_kernels

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


# What a rank sees when another one died: not the cause, and not worth a page of traceback from every rank.
_PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "remote process",
)


def run_rank(main: Callable[[], None]) -> None:
    """Run a rank's `main`; on an error print it at once and end the process without waiting for anybody.

    What the user can mend (a `UserError`, or an `OSError` about a file) is one `error:` line from one rank, with status
    2. Of any other error the rank that failed first prints its traceback first: the others learn of it only when its
    sockets close, and then say so in one line. torchrun ends whoever is left.
    """
    try:
        main()
    except KeyboardInterrupt:
        os._exit(130)
    except SystemExit:
        raise
    except BaseException as error:
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
            os._exit(show_error(error))
        rank = global_rank()
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _PEER_LOST):
            first_line = str(error).split("\n")[0]
            print(
                f"rank {rank}: lost contact with another rank, whose error stands above if it had time to print one "
                f"({first_line})",
                file=sys.stderr,
                flush=True,
            )
        else:
            print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        # A normal exit would wait in process-group destructors for ranks that will not answer.
        os._exit(1)
