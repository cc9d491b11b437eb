"""Weights in megatron-core's distributed checkpoint format (`torch_dist`), without a model: one tensor at a time.

torch's planner requests each tensor when it is about to write it, and only requested tensors are read, so converting a
7B model takes a few hundred megabytes of memory.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from typing_extensions import override

from megatron_eve.checkpoint.hf.folder import LazyTensor

# torch writes in C++, whose errors (of a full disk) name the file of its code or its class.
_WRITER = re.compile(r"inline_container|PytorchStreamWriter")


@contextmanager
def _alone() -> Iterator[None]:
    """torch warns that there is no process group, which is the intent."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


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


class DistFolder:
    """Reads a checkpoint's tensors by their keys, whole, whatever layout wrote them.

    Args:
        folder: the checkpoint (`iter_0000100`).
    """

    def __init__(self, folder: Path) -> None:
        self._reader = FileSystemReader(folder)
        found = self._reader.read_metadata().state_dict_metadata
        self._tensors = {key: part for key, part in found.items() if isinstance(part, TensorStorageMetadata)}
        self._last: tuple[str, torch.Tensor] | None = None

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, key: str) -> torch.Size:
        """Of the whole tensor."""
        return self._tensors[key].size

    def dtype(self, key: str) -> torch.dtype:
        """As it was saved."""
        return self._tensors[key].properties.dtype

    def tensor(self, key: str) -> torch.Tensor:
        """Read one tensor. The last one is kept: several of another layout may be made of it, one after another."""
        if self._last is None or self._last[0] != key:
            self._last = None
            whole = torch.empty(self.shape(key), dtype=self.dtype(key))
            with _alone():
                dcp.load({key: whole}, storage_reader=self._reader, no_dist=True)
            self._last = key, whole
        return self._last[1]


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
    with _alone(), _own_errors():
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
