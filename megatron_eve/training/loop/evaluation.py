"""Losses on held-out samples while training, dataset by dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_eve.config import RunConfig
from megatron_eve.data.sampling.loader import Step, StepLoader
from megatron_eve.data.sampling.orders import DatasetSlice
from megatron_eve.data.sampling.permutation import sample_order
from megatron_eve.models.build import parameters_gathered
from megatron_eve.models.model_parts import Objective
from megatron_eve.training.loop.fp8_state import snapshot_fp8_state
from megatron_eve.training.loop.loss import Normalizer, counts_of, objectives_of
from megatron_eve.training.loop.step import forward_backward
from megatron_eve.training.loop.targets import TargetModels


def evaluate(
    config: RunConfig,
    chunks: Sequence[DistributedDataParallel],
    loader: StepLoader,
    held_out: Sequence[DatasetSlice],
    models: TargetModels | None = None,
) -> dict[str, dict[str, float]]:
    """Measure the losses on every dataset's held-out samples; the state of the run does not change. Collective.

    Always the same samples: those of `--eval-iters` batches of each dataset, or all. Means are over labels and over
    images, so they do not depend on packing, on the layout or, without `--eval-iters`, on the batch size.

    Args:
        config: of the run.
        chunks: this rank's model chunks, in DDP.
        loader: of the run; its position in the order does not change.
        held_out: held-out part of each dataset.
        models: target models by objective, on the last stage.

    Returns:
        For each dataset its losses by name, as in training, and of an objective with columns each of these: on ranks of
        the last stage, zero elsewhere.
    """
    restore_fp8_state = snapshot_fp8_state(chunks)
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad(), parameters_gathered(config, chunks):
        objectives = objectives_of(config)
        results = {
            part.name: _losses(chunks, _steps(config, loader, part), objectives, models) for part in held_out
        }
    for chunk in chunks:
        chunk.train()
    restore_fp8_state()
    return results


def _steps(config: RunConfig, loader: StepLoader, part: DatasetSlice) -> Iterator[Step]:
    batch, most = config.training.global_batch_size, config.training.eval_iters
    count = len(part) if most is None else min(len(part), most * batch)
    for start in range(0, count, batch):
        # In a fixed random order, so that the first batches represent all of a dataset, even if it is sorted.
        ranks = sample_order(np.arange(start, min(start + batch, count)), len(part), seed=0)
        yield loader.step_of(part.samples(ranks))


def _losses(
    chunks: Sequence[DistributedDataParallel],
    steps: Iterator[Step],
    objectives: tuple[Objective, ...],
    models: TargetModels | None,
) -> dict[str, float]:
    """Mean loss of each objective, and of its columns, over all steps; empty if there is no step."""
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    for step in steps:
        normalizer = Normalizer.of(step, objectives, columns=True)
        losses = forward_backward(chunks, step, normalizer, models, forward_only=True)
        for one in normalizer.reported:
            count = one.count(counts_of(step))
            totals[one.name] = totals.get(one.name, 0.0) + float(losses[one.name]) * count
            counts[one.name] = counts.get(one.name, 0) + count
    return {name: total / max(counts[name], 1) for name, total in totals.items()}
