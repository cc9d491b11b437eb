"""A run, as the training loop sees it: its parts, and what each kind of run does in its own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from megatron.core.distributed import DistributedDataParallel
from numpy.typing import NDArray

from megatron_eve.checkpoint.saver import CheckpointSaver
from megatron_eve.checkpoint.state import TrainState
from megatron_eve.config import RunConfig
from megatron_eve.training.loop.data import RunData
from megatron_eve.training.loop.step_result import StepResult, Values
from megatron_eve.training.monitoring.stragglers import Stragglers


class StepSamples(Protocol):
    """The data of one step, as the loop and the log see it."""

    @property
    def sample_ids(self) -> NDArray[np.int64]:
        """[n] samples of the dataset, in the step's order, over all ranks."""

    @property
    def counts(self) -> dict[str, float]:
        """What losses.jsonl says of the samples, by name: at least `tokens` and `images`, over all ranks."""


class Loader(Protocol):
    """Gives the data of any step of a run; `StepLoader` is the one of decoders.

    Attributes:
        damaged: images that this rank could not decode so far, with their names and why.
    """

    damaged: dict[int, str]

    @property
    def wait(self) -> Any:
        """Its `seconds` are those for which training has waited for data."""

    def step(self, consumed_samples: int, num_samples: int | None = None) -> Any:
        """The step that takes `num_samples` samples after the first `consumed_samples` of the run."""

    def close(self) -> None:
        """Free what reads and decodes."""


@dataclass
class Run(ABC):
    """The parts of a run on this rank, ready for its next step, and how it makes one.

    Attributes:
        chunks: what is saved of the model, in DDP: model chunks of a decoder, or the networks of a tower.
        optimizer: megatron-core's, of all of them.
        scheduler: of the learning rate.
        data: samples, their order, and the held-out ones.
        train_state: where the run stands.
        frozen: the fingerprint of frozen models in a checkpoint (`ModelFamily.fingerprint`).
        stragglers: with `--log-straggler`.
    """

    config: RunConfig
    chunks: list[DistributedDataParallel]
    optimizer: Any
    scheduler: Any
    loader: Loader
    data: RunData
    train_state: TrainState
    frozen: dict[str, Any] | None
    stragglers: Stragglers | None

    @abstractmethod
    def train_step(self, step: Any) -> StepResult:
        """Forward, backward, and the update if the step is good. Collective.

        Args:
            step: of the loader.
        """

    @abstractmethod
    def flops(self, step: Any) -> float:
        """Model FLOPs of a step on each rank."""

    @abstractmethod
    def evaluate(self) -> dict[str, Values]:
        """Losses on held-out samples, dataset by dataset; the state of the run does not change. Collective."""

    @abstractmethod
    def report(self) -> int:
        """Print the startup report. Collective.

        Returns:
            The approximate size of a checkpoint, in bytes.
        """

    def save(self, saver: CheckpointSaver) -> None:
        """Write a checkpoint, or begin to. Collective."""
        saver.save(self.train_state, self.chunks, self.optimizer, self.data.fingerprint, self.frozen)
