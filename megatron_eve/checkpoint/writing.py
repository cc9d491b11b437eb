"""The steps of writing a checkpoint with megatron-core, where a file operation that fails does so on all ranks alike.

`dist_checkpointing.save` writes `common.pt`, `.metadata` and `metadata.json` on rank 0 between collectives: an error
there ends rank 0 and leaves the others waiting. Here the same functions of megatron-core run in the same order, and
each of these writes is followed by an exchange of what came of it.
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


def on_main(do: Callable[[], Any]) -> Any:
    """Run a function on rank 0 and tell all ranks what came of it. Collective.

    Returns:
        What it returned, on every rank.

    Raises:
        CheckpointError: it raised anything at all; the same on every rank. (A full disk is an OSError in Python and a
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
        folder: to write into; it is there.
        content: megatron-core's content metadata.
        before_index: runs on rank 0 when all tensors are written, before the index is.

    Returns:
        The request that writes this rank's tensors, and then, with all ranks, the index.

    Raises:
        CheckpointError: `common.pt` could not be written; the same on every rank.
    """
    state["content_metadata"] = content  # as dist_checkpointing.save does
    sharded, common = save_preprocess(state)
    on_main(lambda: torch.save(common, folder / COMMON))
    strategy = _Strategy(_BACKEND, _VERSION, separation_hint=OPTIMIZER)
    strategy.before_index = before_index
    with _writer_without_files():
        request = strategy.async_save(sharded, folder)
    if request.async_fn is not None:
        request = request._replace(async_fn=partial(_write, request.async_fn, folder))
    return request


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron-core's, with an index whose writing may fail."""

    before_index: Callable[[], None]

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        write, preload, arguments = writer.get_save_function_and_args()
        finalize = partial(_write_index, writer, save_state_dict_ret[1], self.before_index)
        return AsyncRequest(write, arguments, [finalize], preload_fn=preload)


def _write_index(writer: FileSystemWriterAsync, metadata: Any, before_index: Callable[[], None]) -> None:
    """Write `.metadata` and `metadata.json`, when all ranks have written their tensors. Collective.

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

    on_main(write)


class _PlanningWriter(FileSystemWriterAsync):
    """megatron-core's, without the file operations of each rank while it plans.

    They make the folder, which is there, and look for an index, which is not; if one failed on a rank, the others would
    wait for that rank's plan.
    """

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan


@contextlib.contextmanager
def _writer_without_files() -> Iterator[None]:
    """Have megatron-core's strategy, which names the class of its writer, take ours."""
    torch_strategies.FileSystemWriterAsync = _PlanningWriter
    try:
        yield
    finally:
        torch_strategies.FileSystemWriterAsync = FileSystemWriterAsync


def _write(write: Callable[..., None], folder: Path, rank: int, buckets: Any, results: Any) -> None:
    """Runs where megatron-core writes: its own function, then the checksums of what it wrote.

    A failure goes into `results`, from which every rank will hear of it; without its checksums, too, a checkpoint is
    not published.
    """
    try:
        write(rank, buckets, results)
    except Exception as error:  # such as a process that cannot be forked
        results.put(error)
    with contextlib.suppress(OSError):
        write_checksums(folder, f"rank{rank:05d}", [name for _, name, _ in buckets])
