"""The losses of a step, one for each objective, and what they are divided by.

One normaliser for the whole step: the labels, the images and the rows of images to draw, of all packs on all ranks,
known from the manifest before the step runs. megatron-core divides each microbatch's loss by the number of
microbatches M (and multiplies it by the context-parallel size), DDP averages over the ranks that hold the same weights,
so a sum over labels is returned times M * D over the labels of the step, D being the data-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core import parallel_state

from megatron_eve.config import RunConfig
from megatron_eve.data.batch import PackedBatch
from megatron_eve.data.sampling.loader import Step
from megatron_eve.data.text.conversation import IGNORE_INDEX
from megatron_eve.models.decoder.model import ModelLosses
from megatron_eve.models.decoder.next_token import NextToken
from megatron_eve.models.model_parts import Objective, SampleCounts
from megatron_eve.models.registry import find_family

LossFunction = Callable[[ModelLosses], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def objectives_of(config: RunConfig) -> tuple[Objective, ...]:
    """The objectives of a run: the next token, then those of its family. All sums are taken in this order."""
    return (NextToken(), *find_family(config.family).objectives(config))


def counts_of(step: Step) -> SampleCounts:
    """Counts of a step, over all data-parallel ranks."""
    return SampleCounts(step.num_labels, step.num_images, step.num_visual_labels)


@dataclass(frozen=True)
class Reported:
    """A mean that a step reports: of an objective, or of one column of its losses.

    Attributes:
        name: in logs and losses.jsonl.
        objective: whose losses these are.
        column: of them; None: all.
    """

    name: str
    objective: Objective
    column: int | None = None

    def count(self, counts: SampleCounts) -> int:
        """What the sum is divided by."""
        whole = self.objective.count(counts)
        return whole if self.column is None else whole // len(self.objective.columns)


@dataclass(frozen=True)
class Normalizer:
    """The denominators of a step's losses.

    Attributes:
        objectives: the losses.
        counts: of the whole step, over all data-parallel ranks.
        num_packs: packs of the step that hold a sample.
        num_microbatches: M, packs of this rank, empty ones included.
        data_parallel_size: D.
        kind: "global", or "microbatch" for the mean of per-microbatch means, as published runs of the
            families have it (a mean over tokens, and over images, on each device, then DDP's mean).
        columns: columns of the losses are reported, too (`Objective.columns`).
    """

    objectives: tuple[Objective, ...]
    counts: SampleCounts
    num_packs: int
    num_microbatches: int
    data_parallel_size: int
    kind: Literal["global", "microbatch"] = "global"
    columns: bool = False

    @classmethod
    def of(
        cls,
        step: Step,
        objectives: tuple[Objective, ...],
        kind: Literal["global", "microbatch"] = "global",
        *,
        columns: bool = False,
    ) -> Normalizer:
        """The normaliser of a step under the current layout."""
        return cls(
            objectives=objectives,
            counts=counts_of(step),
            num_packs=step.num_packs,
            num_microbatches=step.num_microbatches,
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            kind=kind,
            columns=columns,
        )

    @property
    def reported(self) -> tuple[Reported, ...]:
        """What a step reports: the objectives, in their order, each with its columns behind it if these are wanted."""
        return tuple(
            one
            for objective in self.objectives
            for one in (
                Reported(objective.name, objective),
                *(
                    Reported(name, objective, column)
                    for column, name in enumerate(objective.columns if self.columns else ())
                ),
            )
        )

    def loss_function(self, batch: PackedBatch) -> LossFunction:
        """The loss function that megatron-core's schedule calls with the output of the last stage for a pack.

        It returns the loss to differentiate and what to report by objective: this pack's (and context-parallel
        rank's) shares of the step's means, so that summing over packs and ranks gives the means themselves.
        """
        packs = self.num_microbatches * self.data_parallel_size
        counts, scale = self.counts, float(packs)
        if self.kind == "microbatch":
            counts = SampleCounts(
                labels=int((batch.labels != IGNORE_INDEX).sum()),
                images=len(batch.image_grids),
                visual_labels=int(batch.image_rows[batch.drawn].sum()),
            )
            scale = packs / max(self.num_packs, 1)

        def loss_function(losses: ModelLosses) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            means = {
                one.name: losses[one.name].sum() * (scale / max(one.count(counts), 1))
                for one in self.objectives
            }
            # megatron-core divides the returned loss in place: report copies.
            report = {name: mean.detach() / packs for name, mean in means.items()}
            for one in self.reported:
                if one.column is not None:
                    column = losses[one.objective.name].detach()[..., one.column].sum()
                    report[one.name] = column * (scale / packs / max(one.count(counts), 1))
            first, *others = (one.weight * means[one.name] for one in self.objectives)
            return sum(others, first), report

        return loss_function
