"""Ranks for distributed tests: processes that are started once, import megatron-core once, and run many functions.

Importing megatron-core takes seconds a process, a gloo process group a tenth of one. So the pool keeps its
processes, and each `run` makes a process group over the first `world_size` of them.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

MOST_RANKS = 4
# A function that takes longer hangs: the pool is ended and started anew for the next test.
TIMEOUT_SECONDS = 240


class RankError(AssertionError):
    """A rank raised; the message holds the tracebacks of all ranks that did."""


def _serve(pipe: Connection) -> None:
    """Life of a rank: wait for (function, arguments, rank, world size, store), run it in a process group, answer."""
    # The ranks are gloo's, also where there is a GPU.
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    import torch

    torch.set_num_threads(1)
    from megatron_eve.runtime.accelerator import accelerator

    accelerator()
    import torch.distributed as dist

    while True:
        try:
            function, arguments, rank, world_size, store = pipe.recv()
        except EOFError:
            return
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        try:
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
            try:
                answer = (True, function(*arguments))
            finally:
                _leave()
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


def _leave() -> None:
    """Forget the layout and the process group, whatever state a failed test left them in."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    # A model refers to itself and to its process groups, each of which keeps three threads of gloo, one of which wakes
    # a hundred times a second: late in the suite a rank had four hundred of them, and got slower and slower. The
    # angles that megatron-core caches refer to their module, and so to a group.
    RotaryEmbedding.forward.cache_clear()
    gc.collect()


class RankPool:
    """Up to four ranks, started when first needed."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ranks_")
        self._runs = 0

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run a module-level function on every rank of a fresh gloo process group.

        Returns:
            What each rank returned, in rank order (must pickle).

        Raises:
            RankError: a rank raised, ended, or did not answer in time.
        """
        self._start(world_size)
        # Ranks meet in a file: a port found free may be taken before they use it.
        self._runs += 1
        store = f"file://{self._folder.name}/store_{self._runs}"
        try:
            for rank in range(world_size):
                self._pipes[rank].send((function, arguments, rank, world_size, store))
            answers = [self._answer(rank) for rank in range(world_size)]
        except (EOFError, OSError) as error:
            # The ranks that are left cannot serve the next test alone.
            raise RankError(f"{error!r}; ranks that ended, with their status: {self.close()}") from error
        failed = [f"rank {rank}:\n{text}" for rank, (fine, text) in enumerate(answers) if not fine]
        if failed:
            raise RankError("\n".join(failed))
        return [answer for _, answer in answers]

    def _start(self, count: int) -> None:
        assert count <= MOST_RANKS
        context = multiprocessing.get_context("spawn")
        for _ in range(count - len(self._processes)):
            ours, theirs = context.Pipe()
            # Not daemonic: saving a checkpoint starts a helper process.
            process = context.Process(target=_serve, args=(theirs,))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _answer(self, rank: int) -> Any:
        if not self._pipes[rank].poll(TIMEOUT_SECONDS):
            raise TimeoutError(f"rank {rank} did not answer within {TIMEOUT_SECONDS} s")
        return self._pipes[rank].recv()

    def close(self) -> dict[int, int]:
        """End the ranks. Returns the exit statuses of those that had ended themselves (-9: killed, as for memory)."""
        # A pipe closes a moment before the process ends.
        sentinels = [process.sentinel for process in self._processes]
        multiprocessing.connection.wait(sentinels, timeout=1)
        statuses = {rank: process.exitcode for rank, process in enumerate(self._processes)}
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
        self._processes, self._pipes = [], []
        return {rank: status for rank, status in statuses.items() if status is not None}
