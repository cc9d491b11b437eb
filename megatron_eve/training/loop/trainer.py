"""The parts of a run: model, optimizer, schedule, data and train state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel

from megatron_eve.checkpoint.state import TrainState
from megatron_eve.config import RunConfig
from megatron_eve.data.sampling.loader import StepLoader
from megatron_eve.training.loop.data import RunData
from megatron_eve.training.loop.targets import TargetModels
from megatron_eve.training.monitoring.stragglers import Stragglers


@dataclass
class Trainer:
    """The parts of a run on this rank, ready for its next step.

    Attributes:
        data: samples, their order, and the held-out ones.
        target_models: by objective, on ranks of the last stage.
        frozen: the fingerprint of frozen models in a checkpoint (`ModelFamily.fingerprint`).
        stragglers: with `--log-straggler`.
    """

    config: RunConfig
    chunks: list[DistributedDataParallel]
    optimizer: Any
    scheduler: Any
    loader: StepLoader
    data: RunData
    train_state: TrainState
    target_models: TargetModels
    frozen: dict[str, Any] | None = None
    stragglers: Stragglers | None = None
