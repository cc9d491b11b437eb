"""The losses of a step and what they are divided by.

One normaliser for the whole step: the labels and the images of all packs on all ranks, known from the manifest
before the step runs. megatron-core divides each microbatch's loss by the number of microbatches M (and multiplies
it by the context-parallel size), DDP averages over the ranks that hold the same weights, so a sum over labels is
returned times M * D over the labels of the step, D being the data-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core import parallel_state

from megatron_eve.data.batch import PackedBatch
from megatron_eve.data.conversation import IGNORE_INDEX
from megatron_eve.data.loader import Step
from megatron_eve.models.vlm import ModelLosses

LossFunction = Callable[[ModelLosses], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class Normalizer:
    """What a step's losses are divided by.

    Attributes:
        num_labels, num_images: of the whole step, over all data-parallel ranks.
        num_packs: packs of the step that hold a sample.
        num_microbatches: M, packs of this rank, with those that only fill up the layout's number.
        data_parallel_size: D.
        align_loss_weight: of the aligning loss in the sum of both.
        kind: "global", or "microbatch" for the published mean of per-microbatch means
            (EVEv1/eve/model/language_model/eve_llama.py: a mean over tokens, and over images, on each device, then
            DDP's mean).
    """

    num_labels: int
    num_images: int
    num_packs: int
    num_microbatches: int
    data_parallel_size: int
    align_loss_weight: float = 1.0
    kind: Literal["global", "microbatch"] = "global"

    @classmethod
    def of(
        cls, step: Step, align_loss_weight: float = 1.0, kind: Literal["global", "microbatch"] = "global"
    ) -> Normalizer:
        """The normaliser of a step under the layout that is set up."""
        return cls(
            num_labels=step.num_labels,
            num_images=step.num_images,
            num_packs=step.num_packs,
            num_microbatches=step.num_microbatches,
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            align_loss_weight=align_loss_weight,
            kind=kind,
        )

    def loss_function(self, batch: PackedBatch) -> LossFunction:
        """The function megatron-core's schedule calls on what the last stage computed from a pack.

        It returns the loss to differentiate and what to report: this pack's (and context-parallel rank's) shares
        of the step's "lm loss" and "align loss", so that summing over packs and ranks gives the means themselves.
        """
        packs = self.num_microbatches * self.data_parallel_size
        labels, images, scale = self.num_labels, self.num_images, float(packs)
        if self.kind == "microbatch":
            labels = int((batch.labels != IGNORE_INDEX).sum())
            images, scale = len(batch.image_grids), packs / max(self.num_packs, 1)

        def loss_function(losses: ModelLosses) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            total = losses.language.sum() * (scale / max(labels, 1))
            # megatron-core divides the returned loss in place: report copies.
            report = {"lm loss": total.detach() / packs}
            if losses.aligning is not None:
                aligning = losses.aligning * (scale / max(images, 1))
                report["align loss"] = aligning.detach() / packs
                total = total + self.align_loss_weight * aligning
            return total, report

        return loss_function
