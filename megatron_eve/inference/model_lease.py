"""A lease on the checkpoint of `--model-path` (`checkpoint/lease.py`) while a command answers from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_eve.checkpoint.lease import checkpoint_lease
from megatron_eve.checkpoint.store import CheckpointStore


@contextlib.contextmanager
def model_lease(folder: Path | None) -> Iterator[None]:
    """Keep a checkpoint from being removed by a run that goes on.

    Args:
        folder: of `--model-path`; of a run's folder it is the latest checkpoint. One in Hugging Face layout, and None
            for a server, need no lease.

    Raises:
        CheckpointError: the run's folder does not say which checkpoint is the latest.
    """
    store = CheckpointStore(folder) if folder is not None else None
    iteration = store.latest() if store else None
    if store is None or iteration is None:
        yield
        return
    with checkpoint_lease(store.folder(iteration)):
        yield
