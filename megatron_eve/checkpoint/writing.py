"""Writes a checkpoint with megatron-core so that a failed file operation raises the same error on all ranks.

`dist_checkpointing.save` writes `common.pt`, `.metadata` and `metadata.json` on rank 0 between collectives: an error
there ends rank 0 and leaves the others waiting. Here the same functions of megatron-core run in the same order, and
rank 0 broadcasts the result of each of these writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.utils import _get_failure_dict

from megatron_eve.checkpoint.compatibility import CheckpointError
from megatron_eve.checkpoint.files import OPTIMIZER, write_checksums

_BACKEND, _VERSION = "torch_dist", 1
COMMON = "common.pt"


def on_rank_0(do: Callable[[], Any]) -> Any:
    """Run a function on rank 0 and broadcast its result or error. Collective.

    Returns:
        Its return value, on every rank.

    Raises:
        CheckpointError: it raised any exception; the same on every rank. (A full disk is an OSError in Python and a
            RuntimeError in torch's C++ writer.)
    """
    answer: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            answer[0] = do()
        except (OSError, CheckpointError) as error:
            answer[1] = str(error)
        except Exception as error:
            answer[1] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    torch.distributed.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise CheckpointError(answer[1])
    return answer[0]


def prepare_save(
    state: dict[str, Any], folder: Path, content: dict[str, Any], before_index: Callable[[], None]
) -> AsyncRequest:
    """Plan a checkpoint and write its `common.pt`. Collective.

    Args:
        state: megatron-core's sharded state of this rank.
        folder: an existing folder to write into.
        content: megatron-core's content metadata.
        before_index: called on rank 0 when all tensors are written, before the index is.

    Returns:
        The request that writes this rank's tensors and then, together with all ranks, the index.

    Raises:
        CheckpointError: `common.pt` could not be written; the same on every rank.
    """
    state["content_metadata"] = content  # as dist_checkpointing.save does
    sharded, common = save_preprocess(state)
    on_rank_0(lambda: torch.save(common, folder / COMMON))
    strategy = _Strategy(_BACKEND, _VERSION, separation_hint=OPTIMIZER)
    strategy.before_index = before_index
    with _writer_without_files():
        request = strategy.async_save(sharded, folder)
    if request.async_fn is not None:
        request = request._replace(async_fn=partial(_write, request.async_fn, folder))
    return request


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron-core's save strategy, with `_write_index`, which handles failed writes."""

    before_index: Callable[[], None]

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        write, preload, arguments = writer.get_save_function_and_args()
        finalize = partial(_write_index, writer, save_state_dict_ret[1], self.before_index)
        return AsyncRequest(write, arguments, [finalize], preload_fn=preload)


def _write_index(writer: FileSystemWriterAsync, metadata: Any, before_index: Callable[[], None]) -> None:
    """Write `.metadata` and `metadata.json` after all ranks have written their tensors. Collective.

    Raises:
        CheckpointError: a rank could not write its tensors, or rank 0 these files; the same on every rank.
    """
    main = torch.distributed.get_rank() == 0
    gathered: list[Any] | None = [None] * torch.distributed.get_world_size() if main else None
    torch.distributed.gather_object(writer.retrieve_write_results(), gathered, dst=0)

    def write() -> None:
        assert gathered is not None
        for rank, failure in _get_failure_dict(gathered).items():
            raise CheckpointError(f"rank {rank}: {failure[0]}")
        before_index()
        writer.finish(metadata, gathered)
        save_config(CheckpointingConfig(_BACKEND, _VERSION), str(writer.checkpoint_dir))

    on_rank_0(write)


class _PlanningWriter(FileSystemWriterAsync):
    """megatron-core's writer without file operations while the save is planned.

    They would make the folder, which exists, and look for an index, which does not. If one failed on a rank, the other
    ranks would wait for that rank's plan.
    """

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan


@contextlib.contextmanager
def _writer_without_files() -> Iterator[None]:
    """Replace the writer class that megatron-core's strategy uses; it takes no argument for it."""
    torch_strategies.FileSystemWriterAsync = _PlanningWriter
    try:
        yield
    finally:
        torch_strategies.FileSystemWriterAsync = FileSystemWriterAsync


def _write(write: Callable[..., None], folder: Path, rank: int, buckets: Any, results: Any) -> None:
    """Write this rank's tensors with megatron-core's function, then their checksums, wherever that runs.

    An error goes into `results`, which `_write_index` gathers from all ranks. If the checksums cannot be written,
    `CheckpointStore.publish` refuses the checkpoint.
    """
    try:
        write(rank, buckets, results)
    except Exception as error:  # such as a process that cannot be forked
        results.put(error)
    with contextlib.suppress(OSError):
        write_checksums(folder, f"rank{rank:05d}", [name for _, name, _ in buckets])
