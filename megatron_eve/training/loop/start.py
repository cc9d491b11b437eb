"""What every kind of run does alike before its first step: opens its data, and goes on from a checkpoint."""

from __future__ import annotations

from typing import Any

from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine

from megatron_eve.checkpoint.state import TrainState, load_checkpoint
from megatron_eve.config import RunConfig
from megatron_eve.runtime.phases import phase
from megatron_eve.runtime.ranks import print_rank_0
from megatron_eve.training.faults.bad_steps import start_rerun_machine
from megatron_eve.training.loop.data import RunData, open_data
from megatron_eve.training.loop.optimizer import build_scheduler


def start_with_data(config: RunConfig) -> RunData:
    """The first part of a run: its rerun state machine, and its data, since mistakes there are found fastest."""
    start_rerun_machine(config.faults)
    with phase("opening the data"):
        data = open_data(config)
    for sentence in data.dropped:
        print_rank_0(f"warning: {sentence}")
    return data


def resume(
    config: RunConfig, chunks: list[Any], optimizer: Any, data: RunData, frozen: dict[str, Any] | None
) -> tuple[TrainState, Any]:
    """The last part: load what `--load` names.

    Args:
        config: of the run.
        chunks: what is saved of the model, in DDP.
        optimizer: megatron-core's.
        data: of the run.
        frozen: the fingerprint of its frozen models.

    Returns:
        Where the run stands, and the scheduler of its learning rate there.
    """
    train_state = TrainState()
    if config.checkpoint.load:
        with phase(f"loading {config.checkpoint.load}"):
            train_state = load_checkpoint(config, chunks, optimizer, data.fingerprint, frozen)
    scheduler = build_scheduler(config, optimizer)
    scheduler.step(increment=train_state.consumed_samples)
    # For its messages: the machine counts a step when it begins, and has already counted one that is run again.
    machine = get_rerun_state_machine()
    machine.current_iteration = train_state.iteration + (
        machine.state is RerunState.WILL_RERUN_FROM_CHECKPOINT
    )
    return train_state, scheduler
