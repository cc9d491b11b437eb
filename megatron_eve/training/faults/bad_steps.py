"""Bad steps: detected before the weights are updated, then skipped, or the run stops (`--bad-step-policy`).

A step is bad if a loss or the gradient norm is not finite or, with `--spike-factor`, far above the median of recent
steps. With `--rerun-mode validate_results` megatron-core's rerun state machine runs it again: a different result means
faulty hardware, the same result means that the batch or the weights cause it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from megatron.core.rerun_state_machine import (
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    EXIT_CODE_RESUME_TO_DISAMBIGUATE,
    RerunMode,
    RerunState,
    RerunStateMachine,
    _set_rerun_state_machine,
    destroy_rerun_state_machine,
    get_rerun_state_machine,
)

from megatron_eve.config import FaultConfig
from megatron_eve.training.loop.step_result import StepResult, Values

# Recent steps (`TrainState.recent`) that are needed before spikes are detected.
MIN_STEPS = 20
# Stop after this many skipped steps in a row: more likely divergence or faulty hardware than bad batches.
MAX_CONSECUTIVE_SKIPS = 10
# Largest relative difference between two runs of a step on healthy hardware: some GPU kernels add in any order.
TOLERANCE = 1e-3


def bad_step_reason(values: Values, recent: Sequence[Values], spike_factor: float | None) -> str | None:
    """Why a step is bad; None if it is not.

    Args:
        values: its losses and gradient norm by name.
        recent: those of the last steps whose update was made.
        spike_factor: how many times their median a value may be; None checks only that it is finite.

    A value of exactly 0 comes from a step without anything to compute it from: no image for a loss on images, no
    label, or only text where the weights that read text are frozen. The median leaves such steps out.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            return f"the {name} is {value}"
    if spike_factor is None:
        return None
    for name, value in values.items():
        counted = [before[name] for before in recent if before.get(name)]
        if len(counted) >= MIN_STEPS and value > spike_factor * median(counted):
            return (
                f"the {name} is {value:.4g}, more than {spike_factor:g} times {median(counted):.4g}, the median of the "
                f"last {len(counted)} steps that had one"
            )
    return None


class PolicyRerunStateMachine(RerunStateMachine):
    """megatron-core's rerun state machine, in which a bad step is fatal only with `--bad-step-policy stop`.

    megatron-core's own checks (of each rank's gradients, before they are reduced) pass fatal=True; that is overridden.
    """

    def __init__(self, faults: FaultConfig) -> None:
        super().__init__(mode=RerunMode(faults.rerun_mode))
        self._fatal = faults.bad_step_policy == "stop"

    def should_run_forward_backward(self, data_iterator: Any) -> bool:
        """See `RerunStateMachine.should_run_forward_backward`; a new step resets failed checks."""
        if self.state is RerunState.NOT_RUNNING_YET:
            self.failed_validation_call = self.suspicious_node = None
        return super().should_run_forward_backward(data_iterator)

    def validate_result(self, *args: Any, fatal: bool = True, **kwargs: Any) -> None:
        """See `RerunStateMachine.validate_result`; does nothing in mode disabled.

        There megatron-core would raise on one rank only, while `--bad-step-policy` ends all ranks together.
        """
        if self.mode is RerunMode.DISABLED:
            return
        super().validate_result(*args, fatal=fatal and self._fatal, **kwargs)


def start_rerun_machine(faults: FaultConfig) -> None:
    """Create the global rerun state machine of a run, which megatron-core and `train_step` use."""
    destroy_rerun_state_machine()
    _set_rerun_state_machine(PolicyRerunStateMachine(faults))


_WHOLE_STEP = "found a bad loss or gradient norm of the whole step"


def validate_step(machine: RerunStateMachine, values: Values, bad: str | None) -> None:
    """Pass the result of a whole step to the rerun state machine, on every rank: any may have computed it wrong."""
    machine.validate_result(
        result=torch.tensor(list(values.values()), dtype=torch.float64),
        rejection_func=lambda _: bad is not None,
        message=_WHOLE_STEP,
        comparison_func=relative_difference,
        tolerance=TOLERANCE,
    )


def relative_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest relative difference between the values of two runs of a step; inf if one of two is not finite."""
    same = (first == second) | (first.isnan() & second.isnan())
    relative = (2 * (first - second) / (first + second)).abs().nan_to_num(nan=math.inf)
    return float(torch.where(same, torch.zeros_like(relative), relative).max())


def exit_code(faults: FaultConfig, result: StepResult, skipped_in_a_row: int) -> int:
    """The exit status if the run ends at this step; 0 if it goes on.

    Args:
        faults: holds the policy.
        result: of the step.
        skipped_in_a_row: number of skipped steps just before it.
    """
    if result.exit_code or result.bad is None:
        return result.exit_code
    ends = faults.bad_step_policy == "stop" or skipped_in_a_row + 1 >= MAX_CONSECUTIVE_SKIPS
    return EXIT_CODE_FAILED_ON_RESULT_VALIDATION if ends else 0


def exit_message(faults: FaultConfig, iteration: int, result: StepResult) -> str:
    """The message for a run that ends at a step: what was wrong, the likely cause, and what to do. Collective."""
    state, where = get_rerun_state_machine().state, suspect_ranks()
    problem = f"iteration {iteration}: {result.bad or 'a check failed'}"
    samples = "its samples are listed in bad_steps.jsonl"
    if result.exit_code == EXIT_CODE_RESUME_TO_DISAMBIGUATE:
        return (
            f"{problem}; the same twice here ({where}). It is run again when the job is restarted, on other GPUs if it "
            "gets some; --bad-step-policy skip goes on without it"
        )
    hardware = f"so the hardware is in doubt: {where}. Leave those nodes out (sbatch --exclude)"
    if state is RerunState.RERUNNING_IN_PLACE:
        return f"{problem}; run again it gave another result, {hardware}"
    if state is RerunState.RERUNNING_FROM_CHECKPOINT and result.bad is None:
        return f"{problem}; the step was bad before the restart and is not on these GPUs, {hardware}"
    elsewhere = "; other GPUs gave the same" if state is RerunState.RERUNNING_FROM_CHECKPOINT else ""
    if faults.bad_step_policy == "skip":
        return (
            f"{problem}; {MAX_CONSECUTIVE_SKIPS} bad steps in a row are not the batches' doing: go back to an older "
            f"checkpoint, and lower --lr; {samples}"
        )
    return f"{problem}{elsewhere}; its update was not made, and {samples}. --bad-step-policy skip goes on without them"


def suspect_ranks() -> str:
    """Text that names the ranks whose own gradients failed a check in this step, and their nodes. Collective."""
    machine = get_rerun_state_machine()
    call, message = machine.failed_validation_call, None
    if call is not None and call.caller.message != _WHOLE_STEP:
        node = machine.suspicious_node or os.uname()[1]
        message = f"rank {torch.distributed.get_rank()} on {node}: {call.caller.message}"
    gathered: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, message)
    return "; ".join(one for one in gathered if one) or "no rank by its own gradients"
