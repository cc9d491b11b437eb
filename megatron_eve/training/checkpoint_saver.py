"""Writing checkpoints: in the foreground or, with `--async-save`, in the background while training goes on.

megatron-core plans the writing and has each rank's tensors written by forked processes. What the first rank writes
alone, it writes in two places, each of which ends in an exchange of what came of it (`_on_main`): the folder with
`common.pt` before the tensors, and everything else behind them, when all ranks have finished. Only then does the folder
get its name (`CheckpointStore.publish`). A checkpoint that cannot be written, because the disk is full, say, is given up
on all ranks alike; the one before it stays the latest.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

from megatron_eve.config import RunConfig
from megatron_eve.training.checkpoint import CONTENT, Progress, run_state
from megatron_eve.training.checkpoint_store import OPTIMIZER, CheckpointStore, write_checksums, write_config
from megatron_eve.training.compatibility import CheckpointError
from megatron_eve.training.model import parameters_gathered
from megatron_eve.training.monitor import print_rank_0
from megatron_eve.training.signals import end_with_parent, exit_signals_ignored


class _Writer(filesystem_async.FileSystemWriterAsync):
    """megatron-core's, but for the folder: it is there, and to make sure of it could fail on one rank alone."""

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan


class _Strategy(torch_strategies.TorchDistSaveShardedStrategy):
    """Plans the writing of tensors. The index, which megatron-core would write in a step of the same request, is left
    to `CheckpointSaver`: there, an error of the first rank alone would leave the others waiting for it.

    Attributes:
        writer: knows what came of the writing, and writes the index.
        index: what is to be written into it, without the places of tensors in files; on the first rank.
    """

    writer: _Writer
    index: Any

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
        function, preload, arguments = writer.get_save_function_and_args()
        self.writer, self.index = writer, planned[1]
        return AsyncRequest(function, arguments, [], preload_fn=preload)


# The strategy makes its writer itself.
torch_strategies.FileSystemWriterAsync = _Writer


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
        self._writing: tuple[Path, Progress, _Strategy] | None = None
        self._told: set[str] = set()  # what could not be removed
        self._paused = 0.0  # seconds for which training stood still for the checkpoint at hand
        self.last: int | None = None
        _start_helper()
        # A folder that cannot be cleared up will be heard of in saving.
        with contextlib.suppress(CheckpointError):
            self._on_main(self._store.clear)

    def check_space(self, size: int) -> None:
        """Refuse a disk without room for one checkpoint of `size` bytes more than are kept.

        Raises:
            CheckpointError: there is no room.
        """

        def check() -> None:
            problem = self._store.space_problem(size, self._config.checkpoint.keep_last or 1)
            if problem:
                raise CheckpointError(problem)

        self._on_main(check)

    def save(
        self,
        progress: Progress,
        chunks: Sequence[Any],
        optimizer: Any,
        dataset: dict[str, Any],
        teacher: dict[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint and make it the latest, or begin to; one that is still being written is waited for.

        Args: see `run_state`.
        """
        self.finish()
        self._paused = 0.0
        with self._pause(), parameters_gathered(self._config, chunks):
            state = run_state(self._config, progress, chunks, optimizer, dataset, teacher)
            sharded, common = save_preprocess(state | {"content_metadata": dict(CONTENT)})
            try:
                folder = self._on_main(partial(self._begin, progress.iteration, common))
            except CheckpointError as error:
                self._give_up(progress, str(error))
                return
            strategy = _Strategy("torch_dist", 1, separation_hint=OPTIMIZER)
            self._writing = (folder, progress, strategy)
            request = strategy.async_save(sharded, folder)
            if request.async_fn is not None:
                request = request._replace(async_fn=partial(_write, request.async_fn, folder))
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
        """Publish what is written, as soon as `finished` says so; give it up where it failed."""
        assert self._writing is not None
        folder, progress, strategy = self._writing
        try:
            with self._pause():
                if not finished():
                    return
                written = _gather_results(strategy.writer)
                self._on_main(partial(self._publish, folder, progress, strategy, written))
        except CheckpointError as error:
            self._give_up(progress, str(error))
            return
        self._writing, self.last = None, progress.iteration
        print_rank_0(
            f"saved checkpoint at iteration {progress.iteration} to {self._store.root} "
            f"(training stood still for {self._paused:.2f} s)"
        )

    def _begin(self, iteration: int, common: dict[str, Any]) -> Path:
        """Runs on the first rank: a new folder, and in it what is no tensor, as megatron-core would write it."""
        folder = self._store.begin(iteration)
        try:
            # Through memory: of a full disk, torch's own writing to files makes a RuntimeError without the reason.
            buffer = io.BytesIO()
            torch.save(common, buffer)
            (folder / COMMON_STATE_FNAME).write_bytes(buffer.getbuffer())
        except OSError:
            self._store.abandon(folder)
            raise
        return folder

    def _publish(self, folder: Path, progress: Progress, strategy: _Strategy, written: list[Any]) -> None:
        """Runs on the first rank: the last files, the name, and what need not be kept any more.

        Args:
            folder: of the checkpoint.
            progress: where the run stood.
            strategy: that planned it.
            written: what each rank has written, or a text that says why it could not.
        """
        settings = self._config.checkpoint
        failures = [result for result in written if isinstance(result, str)]
        if failures:
            raise CheckpointError(failures[0])
        self._store.free_reserve(folder)
        strategy.writer.finish(strategy.index, written)
        save_config(CheckpointingConfig(strategy.backend, strategy.version), str(folder))
        write_config(folder, self._config)
        self._store.publish(folder, progress.iteration)
        try:
            problems = self._store.prune(
                settings.keep_last, settings.save_retain_interval, settings.retain_weights_only
            )
        except (OSError, CheckpointError) as error:
            problems = [f"older checkpoints could not be removed ({error})"]
        for problem in problems:
            if problem not in self._told:
                print_rank_0(f"{problem}: remove it by hand")
        self._told.update(problems)

    def _give_up(self, progress: Progress, reason: str) -> None:
        if self._writing and self._main:
            self._store.abandon(self._writing[0])
        self._writing = None
        print_rank_0(
            f"the checkpoint of iteration {progress.iteration} was not written: {reason}; {self._store.free} are free "
            f"for {self._store.root}; the run goes on, and what that folder held before is as it was"
        )

    def _on_main(self, do: Callable[[], Any]) -> Any:
        """Do something on the first rank, and tell all ranks what came of it.

        Raises:
            CheckpointError: it failed; the same on every rank.
        """
        answer: list[Any] = [None, None]
        if self._main:
            try:
                answer[0] = do()
            except (
                OSError,
                RuntimeError,
                CheckpointError,
            ) as error:  # torch makes RuntimeErrors of a full disk
                answer[1] = str(error) or type(error).__name__
        torch.distributed.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise CheckpointError(answer[1])
        return answer[0]

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started


def _start_helper() -> None:
    """Start the process through which writers report to their rank, unless it is there.

    megatron-core would start one itself, which heard signals to the whole job and outlived a rank that is killed.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        with exit_signals_ignored():
            manager.start(end_with_parent)
        filesystem_async._results_queue = manager.Queue()


def _execute(request: AsyncRequest) -> bool:
    request.execute_sync()
    return True


def _gather_results(writer: _Writer) -> list[Any]:
    """What each rank has written, for the index, or a text that says why it could not. Collective."""
    result: Any
    try:
        result = writer.retrieve_write_results()
    except (OSError, EOFError) as error:  # the helper process is gone
        result = f"the writing processes cannot be heard ({error or type(error).__name__})"
    if isinstance(result, tuple):  # megatron-core's way to hand an exception on, with its traceback
        result = str(result[0])
    everyone: list[Any] | None = None
    if torch.distributed.get_rank() == 0:
        everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.gather_object(result, everyone, dst=0)
    return everyone or []


def _write(write: Callable[..., None], folder: Path, rank: int, buckets: Any, results: Any) -> None:
    """Runs where megatron-core writes: its own function, then the checksums of what it wrote.

    A failure to write is in `results` by then, and every rank will hear of it; without its checksums, too, a
    checkpoint is not published.
    """
    try:
        write(rank, buckets, results)
        write_checksums(folder, f"rank{rank:05d}", [name for _, name, _ in buckets])
    except (
        OSError
    ) as error:  # also of starting processes; what is missing is found before the folder gets its name
        print(f"{folder}: rank {rank} could not write its part: {error}", flush=True)
