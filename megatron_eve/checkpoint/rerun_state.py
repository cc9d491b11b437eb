"""What a checkpoint holds of megatron-core's rerun state machine, and who takes it up again."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.rerun_state_machine import RerunMode, RerunState, get_rerun_state_machine

from megatron_eve.checkpoint.compatibility import rank_layout
from megatron_eve.config import RunConfig

_STATE = "rerun_state_machine"


def pending_state() -> dict[str, Any]:
    """What a checkpoint holds of the machine: something only if its next step is to be run again after a restart."""
    machine = get_rerun_state_machine()
    if machine.state is not RerunState.WILL_RERUN_FROM_CHECKPOINT:
        return {}
    # Its enumerations stay out: some versions of Python pickle them in a way that torch will not load.
    kept = machine.state_dict(None, "torch_dist")
    state = {name: kept[name] for name in ("current_iteration", "sharded")}
    return {_STATE: state, f"{_STATE}_ranks": torch.distributed.get_world_size()}


def pending_request(saved: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """What to load of the machine from a checkpoint, given its common state: each rank's own part, if it has one.

    Nothing, if the machine is off; if a bad step is to be skipped, whoever is to blame; or where no rank has the work
    that it had before.
    """
    machine = get_rerun_state_machine()
    same_work = saved.get(f"{_STATE}_ranks") == torch.distributed.get_world_size() and (
        _division_of_work(saved["config"]) == _division_of_work(config.to_dict())
    )
    if not same_work or machine.mode is RerunMode.DISABLED or config.faults.bad_step_policy == "skip":
        return {}
    return {_STATE: {"sharded": machine.state_dict(None, "torch_dist", force=True)["sharded"]}}


def _division_of_work(config: dict[str, Any]) -> tuple[Any, ...]:
    """What decides which rank computes what in a step."""
    data = config["data"]
    packs = data["seq_length"], data["max_images_per_pack"], config["training"]["global_batch_size"]
    return rank_layout(config), *packs


def restore_pending(loaded: dict[str, Any]) -> None:
    """Take up what `pending_request` brought: the next step is one that was bad before the restart."""
    state = loaded.get(_STATE, {})
    if "sharded" in state:
        known = {"mode": RerunMode.VALIDATE_RESULTS, "state": RerunState.WILL_RERUN_FROM_CHECKPOINT}
        get_rerun_state_machine().load_state_dict({**known, **state})
