"""Saves and restores the state of megatron-core's rerun state machine in a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.rerun_state_machine import RerunMode, RerunState, get_rerun_state_machine

from megatron_eve.checkpoint.compatibility import rank_layout
from megatron_eve.config import RunConfig

_STATE = "rerun_state_machine"


def rerun_state_to_save() -> dict[str, Any]:
    """State of the machine to save; empty unless the next step must be run again after a restart."""
    machine = get_rerun_state_machine()
    if machine.state is not RerunState.WILL_RERUN_FROM_CHECKPOINT:
        return {}
    # Without its enums: some versions of Python pickle them in a way that torch refuses to load.
    kept = machine.state_dict(None, "torch_dist")
    state = {name: kept[name] for name in ("current_iteration", "sharded")}
    return {_STATE: state, f"{_STATE}_ranks": torch.distributed.get_world_size()}


def rerun_request(saved: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """State of the machine to load from a checkpoint, given its common state: each rank's own slice.

    Empty if the checkpoint has none, if `--rerun-mode` is disabled, with `--bad-step-policy skip`, or if the ranks
    compute other samples than before (another parallel layout or batch), so that results cannot be compared.
    """
    machine = get_rerun_state_machine()
    same_work = saved.get(f"{_STATE}_ranks") == torch.distributed.get_world_size() and (
        _division_of_work(saved["config"]) == _division_of_work(config.to_dict())
    )
    if not same_work or machine.mode is RerunMode.DISABLED or config.faults.bad_step_policy == "skip":
        return {}
    return {_STATE: {"sharded": machine.state_dict(None, "torch_dist", force=True)["sharded"]}}


def _division_of_work(config: dict[str, Any]) -> tuple[Any, ...]:
    """The settings that decide which rank computes what in a step."""
    data = config["data"]
    packs = data["seq_length"], data["max_images_per_pack"], config["training"]["global_batch_size"]
    return rank_layout(config), *packs


def restore_rerun_state(loaded: dict[str, Any]) -> None:
    """Restore what `rerun_request` loaded: the next step is the one that was bad before the restart."""
    state = loaded.get(_STATE, {})
    if "sharded" in state:
        known = {"mode": RerunMode.VALIDATE_RESULTS, "state": RerunState.WILL_RERUN_FROM_CHECKPOINT}
        get_rerun_state_machine().load_state_dict({**known, **state})
