"""Reads a checkpoint's tensors with megatron-core, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)

from megatron_eve.runtime.progress_bar import byte_progress


def read_tensors(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load the requested tensors with megatron-core's `dist_checkpointing.load`, with a progress bar. Collective."""
    # Replace the reader class that megatron-core's strategy uses; it takes no argument for it.
    torch_strategies.CachedMetadataFileSystemReader = _CountingReader
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(request, str(folder))
        return loaded
    finally:
        torch_strategies.CachedMetadataFileSystemReader = CachedMetadataFileSystemReader


class _CountingReader(CachedMetadataFileSystemReader):
    """megatron-core's reader with a progress bar of the bytes that rank 0 has read."""

    def read_data(self, plan: Any, planner: Any) -> Any:
        def size(item: Any) -> int:
            return int(self.storage_data[item.storage_index].length)

        with byte_progress(f"loading {Path(self.path).name}", sum(map(size, plan.items))) as done:
            return super().read_data(plan, _CountingPlanner(planner, lambda item: done(size(item))))


class _CountingPlanner:
    """A load planner that also calls a function for each item that was read.

    Args:
        planner: the planner that it wraps.
        done: called with each item.
    """

    def __init__(self, planner: Any, done: Callable[[Any], None]) -> None:
        self._planner, self._done = planner, done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)

    def load_bytes(self, item: Any, value: Any) -> None:
        """Called when an object was read."""
        self._planner.load_bytes(item, value)
        self._done(item)

    def commit_tensor(self, item: Any, tensor: Any) -> None:
        """Called when a tensor was read."""
        self._planner.commit_tensor(item, tensor)
        self._done(item)
