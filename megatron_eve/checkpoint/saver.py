"""Writing checkpoints: in the foreground or, with `--async-save`, in the background while training goes on.

megatron-core plans the writing, has each rank's tensors written by forked processes, and puts the index behind them
when all ranks have finished. Only then does the folder get its name (`CheckpointStore.publish`). If a checkpoint cannot
be written (a full disk, for example), all ranks give it up, and the one before it stays the latest.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest

from megatron_eve.checkpoint.compatibility import CheckpointError
from megatron_eve.checkpoint.files import write_config
from megatron_eve.checkpoint.state import CONTENT, TrainState, run_state
from megatron_eve.checkpoint.store import CheckpointStore
from megatron_eve.checkpoint.tokenizer_record import TokenizerRecord, tokenizer_of_run
from megatron_eve.checkpoint.writing import on_rank_0, prepare_save
from megatron_eve.config import RunConfig
from megatron_eve.models.build import parameters_gathered
from megatron_eve.models.registry import tower_family
from megatron_eve.runtime.ranks import print_rank_0
from megatron_eve.runtime.signals import end_with_parent, exit_signals_ignored


class CheckpointSaver:
    """Writes a run's checkpoints into `--save`. All methods are collective.

    Attributes:
        last: iteration of the last checkpoint that was written whole by this process, None before it.
    """

    def __init__(self, config: RunConfig) -> None:
        assert config.checkpoint.save is not None
        self._config = config
        self._store = CheckpointStore(config.checkpoint.save)
        self._main = torch.distributed.get_rank() == 0
        self._queue = AsyncCallsQueue()
        self._writing: tuple[Path, TrainState] | None = None
        self._reported: set[str] = set()  # messages about folders that could not be removed
        self._tokenizer: TokenizerRecord | None = None  # of the run's data
        self._paused = 0.0  # seconds for which training waited for the current checkpoint
        self.last: int | None = None
        _start_helper()
        # A folder that cannot be cleaned up gives an error when saving.
        with contextlib.suppress(CheckpointError):
            on_rank_0(self._store.clear)

    def check_space(self, size: int) -> None:
        """Raise CheckpointError if the disk cannot hold one checkpoint of `size` bytes more than are kept.

        Raises:
            CheckpointError: there is no room.
        """

        def check() -> None:
            problem = self._store.space_problem(size, self._config.checkpoint.keep_last or 1)
            if problem:
                raise CheckpointError(problem)

        on_rank_0(check)

    def save(
        self,
        train_state: TrainState,
        chunks: Sequence[Any],
        optimizer: Any,
        dataset: dict[str, Any],
        frozen: dict[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint and make it the latest, or begin to; one that is still being written is waited for.

        Args: see `run_state`.
        """
        self.finish()
        self._paused = 0.0
        if self._tokenizer is None:  # of the first checkpoint: the files may be gone later
            self._tokenizer = tokenizer_of_run(self._config, dataset)
        with self._pause():
            try:
                folder = on_rank_0(partial(self._store.begin, train_state.iteration))
            except CheckpointError as error:
                self._give_up(train_state, str(error))
                return
            self._writing = (folder, train_state)
            with parameters_gathered(self._config, chunks):
                state = run_state(
                    self._config, train_state, chunks, optimizer, dataset, frozen, self._tokenizer
                )
                try:
                    request = prepare_save(
                        state, folder, dict(CONTENT), partial(self._store.free_reserve, folder)
                    )
                except CheckpointError as error:
                    self._give_up(train_state, str(error))
                    return
                if self._config.checkpoint.async_save:
                    self._queue.schedule_async_request(request)
        if not self._config.checkpoint.async_save:
            self._conclude(partial(_execute, request))

    def poll(self) -> None:
        """Name the checkpoint that is being written in the background, if every rank has written its part."""
        if self._writing:
            self._conclude(lambda: bool(self._queue.maybe_finalize_async_calls()))

    def finish(self) -> None:
        """Wait for the checkpoint that is being written in the background, if there is one."""
        if self._writing:
            self._conclude(lambda: bool(self._queue.maybe_finalize_async_calls(blocking=True)))

    def _conclude(self, finished: Callable[[], bool]) -> None:
        """Publish the checkpoint when `finished` reports that it is written; remove it if writing failed."""
        assert self._writing is not None
        folder, train_state = self._writing
        try:
            with self._pause():
                if not finished():
                    return
                on_rank_0(partial(self._publish, folder, train_state))
        except CheckpointError as error:
            self._give_up(train_state, str(error))
            return
        self._writing, self.last = None, train_state.iteration
        print_rank_0(
            f"saved checkpoint at iteration {train_state.iteration} to {self._store.root} "
            f"(training stood still for {self._paused:.2f} s)"
        )

    def _publish(self, folder: Path, train_state: TrainState) -> None:
        """On the first rank: write the last files, rename the folder, and remove old checkpoints."""
        settings = self._config.checkpoint
        tower = tower_family(self._config.family)
        record = tower.record(self._config) if tower else {}
        write_config(folder, {**self._config.to_dict(), **record})
        self._store.publish(folder, train_state.iteration)
        try:
            problems = self._store.prune(
                settings.keep_last, settings.save_retain_interval, settings.retain_weights_only
            )
        except (OSError, CheckpointError) as error:
            problems = [f"older checkpoints could not be removed ({error})"]
        for problem in problems:
            if problem not in self._reported:
                print_rank_0(f"{problem}: remove it by hand")
        self._reported.update(problems)

    def _give_up(self, train_state: TrainState, reason: str) -> None:
        if self._writing and self._main:
            self._store.abandon(self._writing[0])
        self._writing = None
        print_rank_0(
            f"the checkpoint of iteration {train_state.iteration} was not written: {reason}; "
            f"{self._store.free} are free for {self._store.root}; the run goes on, and what that folder held before "
            "is as it was"
        )

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started


def _start_helper() -> None:
    """Start the process through which writers report to their rank, unless it runs already.

    megatron-core's own would receive signals that are sent to the whole job, and outlive a killed rank.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        with exit_signals_ignored():
            manager.start(end_with_parent)
        filesystem_async._results_queue = manager.Queue()


def _execute(request: AsyncRequest) -> bool:
    request.execute_sync()
    return True
