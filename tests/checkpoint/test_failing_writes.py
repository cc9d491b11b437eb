"""A file operation of a save that fails on one rank: the checkpoint is given up on all ranks, and the run goes on."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.config import TRACKER, RunConfig
from tests.checkpoint.test_saver import checkpoints, config_of
from tests.families.suite import run
from tests.layouts import ONE, TP2_SP
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

# Where a write fails, and how: the module or class that holds the function, its name, and what it raises. A full disk
# is a RuntimeError where torch writes in C++.
WRITES: dict[str, tuple[str, str, BaseException]] = {
    "begin": ("tempfile", "mkdtemp", OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))),
    "common.pt": ("torch", "save", RuntimeError("PytorchStreamWriter failed writing file data/0")),
    "common.pt, in Python": ("torch", "save", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    ".metadata": (
        "megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync",
        "finish",
        OSError(errno.EIO, os.strerror(errno.EIO)),
    ),
    "metadata.json": (
        "megatron_eve.checkpoint.writing",
        "save_config",
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ),
    "config.yaml": (
        "megatron_eve.checkpoint.saver",
        "write_config",
        OSError(errno.EACCES, os.strerror(errno.EACCES)),
    ),
    "checksums": (
        "megatron_eve.checkpoint.store",
        "write_checksums",
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ),
    "name": ("pathlib.Path", "rename", OSError(errno.ENOENT, os.strerror(errno.ENOENT))),
    "tracker": (
        "megatron_eve.checkpoint.store.CheckpointStore",
        "_write_tracker",
        OSError(errno.EIO, os.strerror(errno.EIO)),
    ),
}


def _held_by(path: str) -> Any:
    """A module, or a class of one."""
    import importlib

    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, name = path.rsplit(".", 1)
        return getattr(importlib.import_module(module), name)


def save_with_faults(config: RunConfig, writes: list[str | None]) -> tuple[str, int | None]:
    """Runs on each rank: a step and a save for each of `writes`, which fails on rank 0 where one is named.

    Returns:
        What was printed, and the iteration of the last whole checkpoint.
    """
    import contextlib
    import io

    import torch

    from megatron_eve.checkpoint import store as checkpoint_store
    from megatron_eve.checkpoint.saver import CheckpointSaver
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import setup, train_one

    checkpoint_store._RESERVE_BYTES = 4096
    printed = io.StringIO()
    with model_parallel(config), contextlib.redirect_stdout(printed):
        trainer = setup(config)
        saver = CheckpointSaver(config)
        for write in writes:
            train_one(trainer)
            with contextlib.ExitStack() as restore:
                if write is not None and torch.distributed.get_rank() == 0:
                    owner, name, error = WRITES[write]
                    _replace(restore, _held_by(owner), name, error)
                saver.save(
                    trainer.train_state, trainer.chunks, trainer.optimizer, trainer.data.fingerprint,
                    trainer.frozen,
                )  # fmt: skip
                saver.finish()
        trainer.loader.close()
    return printed.getvalue(), saver.last


def _replace(restore: Any, owner: Any, name: str, error: BaseException) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise error

    restore.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, fail)


@pytest.mark.parametrize(
    "background",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["foreground", "background"],
)
def test_a_write_of_rank_0_that_fails_costs_only_that_checkpoint(
    ranks: RankPool, tmp_path: Path, background: bool
) -> None:
    """Every write that rank 0 makes by itself, one a save; then what is left is resumed from, bit for bit."""
    writes: list[str | None] = [None, *WRITES, None]
    config = config_of(TP2_SP, tmp_path, iterations=len(writes), async_save=background)
    (printed, last), (_, other) = ranks.run(2, save_with_faults, config, writes)
    assert last == other == len(writes)
    for iteration, write in enumerate(writes, start=1):
        given_up = f"the checkpoint of iteration {iteration} was not written: "
        assert printed.count(given_up) == (write is not None), write
    assert printed.count("the run goes on") == len(WRITES)
    # "tracker" failed when the folder had its name already: it is whole, and nothing names it.
    named = [f"iter_{n:07d}" for n in (1, 1 + list(writes).index("tracker"), len(writes))]
    assert checkpoints(tmp_path) == [*named, TRACKER]
    assert (tmp_path / TRACKER).read_text() == str(len(writes))


@pytest.mark.slow
def test_what_was_there_before_loads_after_a_failed_write(ranks: RankPool, tmp_path: Path) -> None:
    config = config_of(TP2_SP, tmp_path, iterations=3)
    ranks.run(2, save_with_faults, config, [None, "common.pt", ".metadata"])
    assert (tmp_path / TRACKER).read_text() == "1"
    again = ranks.run(1, run, config_of(ONE, tmp_path, iterations=3, load=True))
    assert len(again[0].losses) == 2
