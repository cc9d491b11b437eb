"""The language loss and its normaliser.

One normaliser for the whole step: the number of labels of all packs on all ranks, known from the manifest before
the step runs. megatron-core divides each microbatch's loss by the number of microbatches M and DDP averages over
the data-parallel size D, so a sum over labels is returned times M * D over the labels of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class Normalizer:
    """What a step's losses are divided by.

    Attributes:
        num_labels: labels of the whole step, over all data-parallel ranks.
        num_microbatches: M, packs of this rank.
        data_parallel_size: D.
        kind: "global", or "microbatch" for the published mean of per-microbatch means
            (EVEv1/eve/model/language_model/eve_llama.py: a token mean on each device, then DDP's mean).
    """

    num_labels: int
    num_microbatches: int
    data_parallel_size: int
    kind: Literal["global", "microbatch"] = "global"

    def language_loss(self) -> LossFunction:
        """The function megatron-core's schedule calls on the last stage's output, float32 losses [R].

        It returns the loss to differentiate and what to report: {"lm loss": this pack's share of the step's mean},
        so that summing over packs and ranks gives the mean itself.
        """

        def loss_function(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            packs = self.num_microbatches * self.data_parallel_size
            if self.kind == "global":
                share = losses.sum() / max(self.num_labels, 1)
            else:
                share = losses.sum() / max(losses.numel(), 1) / packs
            # megatron-core divides the returned loss in place: report a copy.
            return share * packs, {"lm loss": share.detach().clone()}

        return loss_function
