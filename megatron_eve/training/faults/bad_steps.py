"""Steps whose result is not to be trusted: found before their update is made, told apart, and left out or stopped at.

A step is bad if a loss or the gradient norm is not finite or, with `--spike-factor`, far above what went before. With
`--rerun-mode validate_results` megatron-core's rerun state machine runs it again: a result that differs is the
hardware's doing, and one that repeats itself the batch's. `--bad-step-policy` says what follows.
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

# A spike is measured against the median of the steps before it (`Progress.recent`), once there are so many.
MIN_STEPS = 20
# A run that leaves out so many steps in a row has worse than a bad batch.
MAX_CONSECUTIVE_SKIPS = 10
# Relative difference between two runs of a step that is not the hardware's: some kernels on GPUs add in any order.
TOLERANCE = 1e-3


def bad_step_reason(values: Values, recent: Sequence[Values], spike_factor: float | None) -> str | None:
    """What is wrong with a step; None if nothing is.

    Args:
        values: its losses and gradient norm by name.
        recent: those of the last steps whose update was made.
        spike_factor: how many times their median a value may be; None judges only whether it is finite.

    A value of exactly 0 is one of a step that had nothing to count for it: no image for a loss on images, no label, or
    only text where the weights that read text are frozen. Such steps say nothing of what is usual, so the median is of
    the others, once there are enough of them.
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
    """megatron-core's rerun state machine under a policy: what is left out need not end the run.

    megatron-core's own checks (of each rank's gradients, before they are reduced) always call a failure fatal.
    """

    def __init__(self, faults: FaultConfig) -> None:
        super().__init__(mode=RerunMode(faults.rerun_mode))
        self._fatal = faults.bad_step_policy == "stop"

    def should_run_forward_backward(self, data_iterator: Any) -> bool:
        """See `RerunStateMachine.should_run_forward_backward`; each step begins without suspects."""
        if self.state is RerunState.NOT_RUNNING_YET:
            self.failed_validation_call = self.suspicious_node = None
        return super().should_run_forward_backward(data_iterator)

    def validate_result(self, *args: Any, fatal: bool = True, **kwargs: Any) -> None:
        """See `RerunStateMachine.validate_result`. Off, it would raise on one rank alone: the policy ends all."""
        if self.mode is RerunMode.DISABLED:
            return
        super().validate_result(*args, fatal=fatal and self._fatal, **kwargs)


def start_rerun_machine(faults: FaultConfig) -> None:
    """Make the rerun state machine of a run, which megatron-core and `train_step` ask for by themselves."""
    destroy_rerun_state_machine()
    _set_rerun_state_machine(PolicyRerunStateMachine(faults))


_WHOLE_STEP = "found a bad loss or gradient norm of the whole step"


def validate_step(machine: RerunStateMachine, values: Values, bad: str | None) -> None:
    """Tell the machine what came of a whole step. On every rank, since any of them may have spoilt it."""
    machine.validate_result(
        result=torch.tensor(list(values.values()), dtype=torch.float64),
        rejection_func=lambda _: bad is not None,
        message=_WHOLE_STEP,
        comparison_func=relative_difference,
        tolerance=TOLERANCE,
    )


def relative_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference between two runs of a step; infinite where only one of them is finite."""
    same = (first == second) | (first.isnan() & second.isnan())
    relative = (2 * (first - second) / (first + second)).abs().nan_to_num(nan=math.inf)
    return float(torch.where(same, torch.zeros_like(relative), relative).max())


def exit_code(faults: FaultConfig, result: StepResult, skipped_in_a_row: int) -> int:
    """The status with which a run ends at a step; 0 if it goes on.

    Args:
        faults: the policy.
        result: of the step.
        skipped_in_a_row: bad steps just before it.
    """
    if result.exit_code or result.bad is None:
        return result.exit_code
    ends = faults.bad_step_policy == "stop" or skipped_in_a_row + 1 >= MAX_CONSECUTIVE_SKIPS
    return EXIT_CODE_FAILED_ON_RESULT_VALIDATION if ends else 0


def exit_message(faults: FaultConfig, iteration: int, result: StepResult) -> str:
    """Why a run ends at a step, for people: what was wrong, what is known of it, and what to do. Collective."""
    state, where = get_rerun_state_machine().state, suspect_ranks()
    found = f"iteration {iteration}: {result.bad or 'a check failed'}"
    samples = "its samples are listed in bad_steps.jsonl"
    if result.exit_code == EXIT_CODE_RESUME_TO_DISAMBIGUATE:
        return (
            f"{found}; the same twice here ({where}). It is run again when the job is restarted, on other GPUs if it "
            "gets some; --bad-step-policy skip goes on without it"
        )
    hardware = f"so the hardware is in doubt: {where}. Leave those nodes out (sbatch --exclude)"
    if state is RerunState.RERUNNING_IN_PLACE:
        return f"{found}; run again it gave another result, {hardware}"
    if state is RerunState.RERUNNING_FROM_CHECKPOINT and result.bad is None:
        return f"{found}; the step was bad before the restart and is not on these GPUs, {hardware}"
    elsewhere = "; other GPUs gave the same" if state is RerunState.RERUNNING_FROM_CHECKPOINT else ""
    if faults.bad_step_policy == "skip":
        return (
            f"{found}; {MAX_CONSECUTIVE_SKIPS} bad steps in a row are not the batches' doing: go back to an older "
            f"checkpoint, and lower --lr; {samples}"
        )
    return f"{found}{elsewhere}; its update was not made, and {samples}. --bad-step-policy skip goes on without them"


def suspect_ranks() -> str:
    """Ranks whose own gradients failed a check in this step, and their nodes, for people. Collective."""
    machine = get_rerun_state_machine()
    call, message = machine.failed_validation_call, None
    if call is not None and call.caller.message != _WHOLE_STEP:
        node = machine.suspicious_node or os.uname()[1]
        message = f"rank {torch.distributed.get_rank()} on {node}: {call.caller.message}"
    gathered: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, message)
    return "; ".join(one for one in gathered if one) or "no rank by its own gradients"
