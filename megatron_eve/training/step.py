"""One optimizer step through megatron-core's schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_eve.accelerator import accelerator
from megatron_eve.data.batch import PackedBatch
from megatron_eve.data.loader import Step
from megatron_eve.models.eve.teacher import Teacher
from megatron_eve.models.vlm import VisionLanguageModel
from megatron_eve.training.loss import LossFunction, Normalizer
from megatron_eve.training.microbatch import model_inputs
from megatron_eve.training.model import unwrap


def forward_step(
    batches: Iterator[PackedBatch],
    model: torch.nn.Module,
    *,
    normalizer: Normalizer,
    teacher: Teacher | None,
) -> tuple[Any, LossFunction]:
    """What the schedule runs for each microbatch and model chunk: one pack through one chunk."""
    batch = next(batches)
    return model(model_inputs(batch, unwrap(model), teacher)), normalizer.loss_function(batch)


def forward_backward(
    chunks: Sequence[DistributedDataParallel],
    step: Step,
    normalizer: Normalizer,
    teacher: Teacher | None = None,
    *,
    forward_only: bool = False,
) -> dict[str, torch.Tensor]:
    """Run a step's packs forward and backward; gradients are left reduced in the DDP buffers.

    Args:
        chunks: this rank's model chunks, in DDP.
        step: the packs.
        normalizer: what the losses are divided by.
        teacher: on the last stage of a model with an aligning layer.
        forward_only: losses without gradients.

    Returns:
        Losses of the whole step by name ("lm loss", and "align loss" with the aligning layer), float64 scalars, the
        same on every rank of the last stage (zero elsewhere).
    """
    interleaved = len(chunks) > 1
    iterators = [iter(step.batches) for _ in chunks]
    results: list[dict[str, torch.Tensor]] = get_forward_backward_func()(
        forward_step_func=partial(forward_step, normalizer=normalizer, teacher=teacher),
        data_iterator=iterators if interleaved else iterators[0],
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=step.num_microbatches,
        seq_length=1,  # unused: stages exchange shapes (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return _reduce(results, unwrap(chunks[0]))


def _reduce(results: list[dict[str, torch.Tensor]], chunk: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """Sum the reported shares over microbatches and ranks, in float64 and in a fixed order."""
    names = ["lm loss", "align loss"] if chunk.patch_aligning else ["lm loss"]
    totals = torch.zeros(len(names), dtype=torch.float64, device=accelerator().device)
    for result in results:
        totals += torch.stack([result[name].double() for name in names])
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(totals, group=group)
        if chunk.patch_aligning and chunk.config.sequence_parallel:
            # Each tensor-parallel rank aligned its own rows.
            torch.distributed.all_reduce(totals[1:], group=parallel_state.get_tensor_model_parallel_group())
    return dict(zip(names, totals, strict=True))


def train_step(
    chunks: Sequence[DistributedDataParallel],
    optimizer: Any,
    step: Step,
    normalizer: Normalizer,
    teacher: Teacher | None = None,
) -> tuple[dict[str, torch.Tensor], float]:
    """Forward, backward, update.

    Returns:
        losses (see `forward_backward`) and the gradient norm before any clipping.

    Raises:
        FloatingPointError: the gradient is not finite. The weights may have taken it by then, so the run ends
            here, on every rank alike and before anything is saved.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    losses = forward_backward(chunks, step, normalizer, teacher)
    succeeded, grad_norm, _ = optimizer.step()
    if not succeeded or not math.isfinite(grad_norm):
        raise FloatingPointError(
            f"the gradient of this step is not finite; its samples are {step.sample_ids.tolist()}; "
            "nothing of it was saved: resume from the last checkpoint with a lower --lr"
        )
    return losses, float(grad_norm)
