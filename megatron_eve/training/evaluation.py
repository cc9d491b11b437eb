"""Losses on held-out samples while training, dataset by dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_eve.config import RunConfig
from megatron_eve.data.loader import Step, StepLoader
from megatron_eve.data.order import sample_order
from megatron_eve.data.sampling import Part
from megatron_eve.models.build import parameters_gathered
from megatron_eve.models.eve.teacher import Teacher
from megatron_eve.training.loss import Normalizer
from megatron_eve.training.scales import keep_scales
from megatron_eve.training.step import forward_backward


def evaluate(
    config: RunConfig,
    chunks: Sequence[DistributedDataParallel],
    loader: StepLoader,
    held_out: Sequence[Part],
    teacher: Teacher | None = None,
) -> dict[str, dict[str, float]]:
    """Measure the losses on every dataset's held-out samples, without a trace in the run. Collective.

    Always the same samples: those of `--eval-iters` batches of each dataset, or all. Means are over labels and over
    images, so they do not depend on packing, on the layout or, without `--eval-iters`, on the batch size.

    Args:
        config: of the run.
        chunks: this rank's model chunks, in DDP.
        loader: of the run, whose place in the order stays as it is.
        held_out: what to measure on.
        teacher: on the last stage of a model with an aligning layer.

    Returns:
        For each dataset its losses by name, as in training: on ranks of the last stage, zero elsewhere.
    """
    put_scales_back = keep_scales(chunks)
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad(), parameters_gathered(config, chunks):
        results = {part.name: _losses(chunks, _steps(config, loader, part), teacher) for part in held_out}
    for chunk in chunks:
        chunk.train()
    put_scales_back()
    return results


def _steps(config: RunConfig, loader: StepLoader, part: Part) -> Iterator[Step]:
    batch, most = config.training.global_batch_size, config.training.eval_iters
    count = len(part) if most is None else min(len(part), most * batch)
    for start in range(0, count, batch):
        # In a random order, the same each time: the first batches speak for all of a dataset that is sorted.
        ranks = sample_order(np.arange(start, min(start + batch, count)), len(part), seed=0)
        yield loader.step_of(part.samples(ranks))


def _losses(
    chunks: Sequence[DistributedDataParallel], steps: Iterator[Step], teacher: Teacher | None
) -> dict[str, float]:
    """Means over all labels, and over all images, of the steps."""
    totals, counts = {"lm loss": 0.0, "align loss": 0.0}, {"lm loss": 0, "align loss": 0}
    names: Sequence[str] = ()
    for step in steps:
        losses = forward_backward(chunks, step, Normalizer.of(step), teacher, forward_only=True)
        names = tuple(losses)
        for name, count in (("lm loss", step.num_labels), ("align loss", step.num_images)):
            if name in losses:
                totals[name] += float(losses[name]) * count
                counts[name] += count
    return {name: totals[name] / max(counts[name], 1) for name in names}
