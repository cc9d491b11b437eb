"""Which ranks are slow: every rank's time in its own forward passes and in getting its data, compared.

A step lasts as long as its slowest rank, and every rank's step time is the same: the others wait for it. Forward passes
and data are timed because there a rank works by itself, apart from tensor and context parallelism, whose ranks wait for
each other layer by layer: a report names such a group by one of its ranks. Ranks are compared within their pipeline
stage, since stages differ in their work.

megatron-core's StragglerDetector times the same but needs CUDA, and opens a port for being switched on.
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
    """A rank's seconds since the last report, and the pipeline stage that it works on."""

    node: str
    stage: int
    forward: float
    data: float


class Stragglers:
    """Takes this rank's times and compares them with the others'."""

    def __init__(self) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._forward = self._data = 0.0

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Time a forward pass; on a GPU by events, which wait for nothing."""
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
        """Time what gets a step's data."""
        started = time.perf_counter()
        yield
        self._data += time.perf_counter() - started

    def report(self) -> str:
        """Compare the ranks, and begin anew. Collective."""
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
    """A line for people: of forward passes and of data, the rank that is slowest beside the others of its stage.

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
