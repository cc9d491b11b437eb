"""The log line of a training iteration, in Megatron's words and units."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from datetime import datetime
from statistics import mean
from typing import Any

_RECENT = 50  # steps that the estimate of the remaining time is computed from


class LogLine:
    """Collects the steps since the last log line, and formats the next one.

    Speeds and waits are means over these steps; losses, gradient norm and learning rate are the last step's.

    Args:
        iterations, samples: of the whole run.
        epoch_samples: samples of the training data; None if it has no size, and then no epoch is shown.
        gpu: the ranks run on GPUs, so that the memory is a GPU's and the speed that of a GPU.
    """

    def __init__(self, iterations: int, samples: int, epoch_samples: int | None, *, gpu: bool) -> None:
        self._iterations, self._samples, self._epoch_samples = iterations, samples, epoch_samples
        self._speed = "throughput per GPU (TFLOP/s/GPU)" if gpu else "throughput per rank (TFLOP/s/rank)"
        self._memory = "peak GPU memory (GiB)" if gpu else "peak RSS (GiB)"
        self._steps: list[dict[str, Any]] = []
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._first: float | None = None

    def add(self, record: dict[str, Any]) -> None:
        """Add a step: its line of losses.jsonl."""
        self._steps.append(record)
        # The first step compiles kernels and allocates memory: it says nothing about the others.
        if self._first is None:
            self._first = record["seconds"]
        else:
            self._recent.append(record["seconds"])

    def text(self, losses: Mapping[str, float], now: datetime) -> str:
        """The line for the steps that were added since the last call, at least one.

        Args:
            losses: of the last step, by the name of the objective.
            now: local time.
        """
        steps, self._steps = self._steps, []
        last, seconds = steps[-1], sum(step["seconds"] for step in steps)
        consumed, iteration = last["consumed_samples"], last["iteration"]
        parts = [
            f"[{now:%Y-%m-%d %H:%M:%S}] iteration {iteration:{len(str(self._iterations))}d}/{self._iterations}",
            f"consumed samples: {consumed:{len(str(self._samples))}d}",
        ]
        if self._epoch_samples:
            parts.append(f"epoch: {consumed / self._epoch_samples:.2f}")
        parts += [
            f"elapsed time per iteration (ms): {1000 * seconds / len(steps):.1f}",
            f"data wait (ms): {1000 * mean(step['data_wait_seconds'] for step in steps):.1f}",
            f"{self._speed}: {sum(step['tflops_per_gpu'] * step['seconds'] for step in steps) / seconds:.4g}",
            *(
                f"{name}/s: {sum(step[name] for step in steps) / seconds:.0f}"
                for name in ("tokens", "codes")
                if name in last
            ),
            f"{self._memory}: {last['peak_memory_bytes'] / 2**30:.2f}",
            f"learning rate: {last['lr']:.3E}",
            *(f"{name}: {loss:.6E}" for name, loss in losses.items()),
            f"grad norm: {last['grad_norm']:.3f}",
            *(["update skipped"] if last["skipped"] else []),
            f"ETA: {duration(self.seconds_left(iteration))}",
        ]
        return " | ".join(parts) + " |"

    def seconds_left(self, iteration: int) -> float:
        """Expected time of the remaining iterations, without evaluations and checkpoints."""
        usual = mean(self._recent) if self._recent else self._first or 0.0
        return (self._iterations - iteration) * usual


def duration(seconds: float) -> str:
    """Hours and minutes as h:mm, from a day on as "1d 02:05"; begun minutes count as whole ones."""
    minutes = -int(-seconds // 60)
    days, hours = divmod(minutes // 60, 24)
    return f"{days}d {hours:02d}:{minutes % 60:02d}" if days else f"{hours}:{minutes % 60:02d}"
