"""One optimizer step through megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import get_rerun_state_machine

from megatron_eve.data.sampling.loader import Step
from megatron_eve.models.build import unwrap
from megatron_eve.models.shapes import schedule_shapes
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.training.faults.bad_steps import bad_step_reason, validate_step
from megatron_eve.training.loop.fp8_state import snapshot_fp8_state
from megatron_eve.training.loop.loss import LossFunction, Normalizer, Reported
from megatron_eve.training.loop.microbatch import DevicePack, model_inputs, pack_iterators
from megatron_eve.training.loop.step_result import StepResult, Values
from megatron_eve.training.loop.targets import TargetModels, prefetch_targets
from megatron_eve.training.monitoring.stragglers import Stragglers


def forward_step(
    packs: Iterator[DevicePack],
    model: torch.nn.Module,
    *,
    normalizer: Normalizer,
    models: TargetModels | None,
    stragglers: Stragglers | None,
) -> tuple[Any, LossFunction]:
    """The forward step that the schedule calls: one pack through one model chunk."""
    pack = next(packs)
    with stragglers.forward() if stragglers else nullcontext():
        outputs = model(model_inputs(pack, unwrap(model), models))
    return outputs, normalizer.loss_function(pack.batch)


def forward_backward(
    chunks: Sequence[DistributedDataParallel],
    step: Step,
    normalizer: Normalizer,
    models: TargetModels | None = None,
    *,
    forward_only: bool = False,
    stragglers: Stragglers | None = None,
) -> dict[str, torch.Tensor]:
    """Run a step's packs forward and backward; gradients are left reduced in the DDP buffers.

    Args:
        chunks: this rank's model chunks, in DDP.
        step: the packs.
        normalizer: what the losses are divided by.
        models: target models by objective, on the last stage (see `build_target_models`).
        forward_only: losses without gradients.
        stragglers: records the times of forward passes.

    Returns:
        Losses of the whole step by name, in the order of the normaliser's `reported`: float64 scalars, the same on
        every rank of the last stage (zero elsewhere).
    """
    interleaved = len(chunks) > 1
    early = prefetch_targets(models or {}, step.batches)
    packs = map(DevicePack, step.batches, chain(early, repeat(None)))
    iterators = pack_iterators(packs, len(chunks))
    results: list[dict[str, torch.Tensor]] = get_forward_backward_func()(
        forward_step_func=partial(forward_step, normalizer=normalizer, models=models, stragglers=stragglers),
        data_iterator=iterators if interleaved else iterators[0],
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=step.num_microbatches,
        micro_batch_size=1,
        forward_only=forward_only,
        **schedule_shapes(unwrap(chunks[0]), step.pack_length),
    )
    return _reduce(results, normalizer.reported, unwrap(chunks[0]).config.sequence_parallel)


def _reduce(
    results: list[dict[str, torch.Tensor]], reported: Sequence[Reported], sequence_parallel: bool
) -> dict[str, torch.Tensor]:
    """Sum the reported shares over microbatches and ranks, in float64 and in a fixed order."""
    names = [one.name for one in reported]
    totals = torch.zeros(len(names), dtype=torch.float64, device=accelerator().device)
    for result in results:
        totals += torch.stack([result[name].double() for name in names])
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(totals, group=group)
        for place, one in enumerate(reported):
            if sequence_parallel and one.objective.adds_over_tensor_parallel:
                group = parallel_state.get_tensor_model_parallel_group()
                torch.distributed.all_reduce(totals[place : place + 1], group=group)
    return dict(zip(names, totals, strict=True))


def train_step(
    chunks: Sequence[DistributedDataParallel],
    optimizer: Any,
    step: Step,
    normalizer: Normalizer,
    models: TargetModels | None = None,
    *,
    recent: Sequence[Values] = (),
    spike_factor: float | None = None,
    stragglers: Stragglers | None = None,
    seed: Callable[[], None] = lambda: None,
) -> StepResult:
    """Forward, backward, and the update if the step is good.

    Args:
        chunks, step, normalizer, models, stragglers: see `forward_backward`.
        optimizer: megatron-core's.
        recent, spike_factor: what makes a step bad (see `bad_step_reason`).
        seed: called whenever the step is run, before it: seeds its random numbers (see `seed_dropout`).
    """
    machine = get_rerun_state_machine()
    restore_fp8_state, again = snapshot_fp8_state(chunks), False
    # Once, or as often as the rerun state machine repeats the step; the last result counts.
    while machine.should_run_forward_backward(None):
        if again:
            restore_fp8_state()
        again = True
        seed()
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        shares = forward_backward(chunks, step, normalizer, models, stragglers=stragglers)
        optimizer.prepare_grads()
        losses, grad_norm = _share(shares, optimizer.get_grad_norm())
        result = StepResult(losses, grad_norm)
        result = replace(result, bad=bad_step_reason(result.values, recent, spike_factor))
        validate_step(machine, result.values, result.bad)
    _, leaves, exit_code = machine.should_checkpoint_and_exit()
    if result.bad is None and not leaves:
        # The gradients are ready. Only clipping needs their norm again, and computing it waits for the GPU.
        if optimizer.config.clip_grad > 0:
            optimizer.step()
        else:
            optimizer.step_with_ready_grads()
    else:
        restore_fp8_state()
    return replace(result, exit_code=exit_code)


def holds_losses() -> bool:
    """True on the rank that reports: the last one, which is in the last pipeline stage."""
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def _share(losses: dict[str, torch.Tensor], grad_norm: float) -> tuple[Values, float]:
    """The last rank's losses and gradient norm on every rank, so that all take the same decision. Collective."""
    values = torch.stack(
        [*losses.values(), torch.as_tensor(grad_norm, dtype=torch.float64, device=accelerator().device)]
    )
    torch.distributed.broadcast(values, src=torch.distributed.get_world_size() - 1)
    *shared, grad_norm = values.tolist()
    return dict(zip(losses, shared, strict=True)), grad_norm
