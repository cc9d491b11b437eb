"""Finds slow ranks: compares each rank's time in its forward passes and in getting its data.

All ranks wait for the slowest one, so their step times are the same. Forward passes and data are timed because a rank
does these alone. Tensor- and context-parallel ranks do wait for each other in every layer: the report names one rank of
such a group. Ranks are compared within their pipeline stage, since stages differ in their work.

megatron-core's StragglerDetector measures the same but needs CUDA, and opens a network port to be switched on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from megatron.core import parallel_state

from megatron_eve.runtime.accelerator import accelerator


@dataclass(frozen=True)
class RankTimes:
    """Node and pipeline stage of a rank, and its seconds in forward passes and in data since the last report."""

    node: str
    stage: int
    forward: float
    data: float


class Stragglers:
    """Measures this rank's times and compares them with the other ranks'."""

    def __init__(self) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._forward = self._data = 0.0

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Time a forward pass; on a GPU with CUDA events, which do not synchronize."""
        if accelerator().name == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
            return
        started = time.perf_counter()
        yield
        self._forward += time.perf_counter() - started

    @contextmanager
    def data(self) -> Iterator[None]:
        """Time the loading of a step's data."""
        started = time.perf_counter()
        yield
        self._data += time.perf_counter() - started

    def report(self) -> str:
        """Compare the ranks, and reset the times. Collective."""
        if self._events:
            torch.cuda.synchronize()
            self._forward += sum(start.elapsed_time(end) for start, end in self._events) / 1000
        stage = parallel_state.get_pipeline_model_parallel_rank()
        times = RankTimes(os.uname()[1], stage, self._forward, self._data)
        self._events, self._forward, self._data = [], 0.0, 0.0
        all_ranks: list[RankTimes] = [times] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(all_ranks, times)
        return compare(all_ranks)


def compare(all_ranks: list[RankTimes]) -> str:
    """The log line: for forward passes and for data, the slowest rank relative to the median of its pipeline stage.

    Args:
        all_ranks: times of each rank, in the order of ranks.
    """
    parts = []
    for name in ("forward", "data"):
        seconds = [getattr(one, name) for one in all_ranks]
        ratios = []
        for rank, one in enumerate(all_ranks):
            usual = median(getattr(peer, name) for peer in all_ranks if peer.stage == one.stage)
            ratios.append(seconds[rank] / usual if usual else 1.0)
        slow = ratios.index(max(ratios))
        parts.append(
            f" {name}: rank {slow} on {all_ranks[slow].node} {1000 * seconds[slow]:.1f} ms, {ratios[slow]:.2f} x the "
            f"median of its pipeline stage |"
        )
    return " stragglers |" + "".join(parts)
