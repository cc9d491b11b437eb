"""Reads a checkpoint in megatron-core's format (`torch_dist`) without a model: its tensors, one at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


@contextmanager
def alone() -> Iterator[None]:
    """Without torch's warning that there is no process group, which is the intent."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


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
            with alone():
                dcp.load({key: whole}, storage_reader=self._reader, no_dist=True)
            self._last = key, whole
        return self._last[1]
