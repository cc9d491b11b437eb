"""Writes weights in megatron-core's distributed checkpoint format (`torch_dist`) without a model, one tensor at a time.

torch's planner requests each tensor when it is about to write it, so converting a 7B model takes a few hundred
megabytes of memory. `models/dist_folder.py` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem
from typing_extensions import override

from megatron_eve.checkpoint.hf.folder import LazyTensor
from megatron_eve.models.dist_folder import alone

# torch writes in C++, whose errors (of a full disk) name the file of its code or its class.
_WRITER = re.compile(r"inline_container|PytorchStreamWriter")


@contextmanager
def _own_errors() -> Iterator[None]:
    """The underlying error, instead of torch's list of the ranks that failed."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, RuntimeError) and _WRITER.search(str(cause)):
            raise OSError(f"the checkpoint cannot be written ({str(cause).splitlines()[0]})") from None
        raise cause from None


class _StreamPlanner(DefaultSavePlanner):
    """Plans with tensors without data, and makes the data of each when it is written."""

    def __init__(self, tensors: Mapping[str, LazyTensor], done: Callable[[int], None]) -> None:
        super().__init__(flatten_state_dict=False)
        self._lazy, self._done = tensors, done

    @override
    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        tensor = self._lazy[write_item.index.fqn].tensor()
        self._done(tensor.nbytes)
        return tensor


def write_dist_folder(
    folder: Path, tensors: Mapping[str, LazyTensor], common: dict[str, Any], done: Callable[[int], None]
) -> None:
    """Write a checkpoint that holds weights alone into an existing folder.

    Args:
        folder: an empty one.
        tensors: by key.
        common: what the checkpoint holds beside tensors (see `megatron_eve.checkpoint.state.run_state`).
        done: called with the bytes of each tensor that was made.

    Raises:
        OSError: the disk is full, or another error in writing.
    """
    # A file a tensor: torch's writer holds all tensors of a file until the file is whole.
    writer = FileSystemWriter(folder, single_file_per_rank=False, thread_count=1)
    with alone(), _own_errors():
        dcp.save(
            {key: lazy.empty() for key, lazy in tensors.items()},
            storage_writer=writer,
            planner=_StreamPlanner(tensors, done),
            no_dist=True,
        )
    path = folder / "common.pt"
    try:
        torch.save(common, path)
    except RuntimeError as error:  # the error that torch raises on a full disk
        raise OSError(f"{path}: cannot be written ({str(error).splitlines()[0]})") from None
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
