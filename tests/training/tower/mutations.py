"""Mistakes in a step of a tower's training, each of which the comparison with the plain step must notice."""

from __future__ import annotations

from typing import Any

import torch

from megatron_eve.models.towers.contrast import sigmoid_contrastive
from megatron_eve.models.vila_u.quantizer import Quantizer


def _alone(values: torch.Tensor, group: Any) -> torch.Tensor:
    """In place of a sum over the ranks."""
    return values


def _contrast_within_a_rank(*arguments: Any) -> torch.Tensor:
    share = len(arguments[0]) / 6
    return share * sigmoid_contrastive(*arguments[:-1], None)


def _lookup_with_the_new_weight(
    self: Quantizer, vectors: torch.Tensor, update: Any = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """As `Quantizer._search`, but that a codebook is read behind its update."""
    left, codes, sums = vectors, [], []
    with torch.no_grad():
        for level in range(self.depth):
            code = self.codebooks[level].nearest(left)  # type: ignore[operator]
            if update is not None:
                update(level, left, code)
            found = self._lookup(level, code)
            left = left - found
            sums.append(found if not sums else sums[-1] + found)
            codes.append(code)
    return torch.stack(codes, dim=-1), sums


MUTATIONS: dict[str, list[tuple[str, Any]]] = {
    "sums of codebooks not reduced": [("megatron_eve.models.vila_u.quantizer.sum_over_ranks", _alone)],
    "lambda of each rank": [("megatron_eve.training.tower.step.sum_over_ranks", _alone)],
    "contrast within a rank": [
        ("megatron_eve.training.tower.step.sigmoid_contrastive", _contrast_within_a_rank)
    ],
    "lookup with the new weight": [
        ("megatron_eve.models.vila_u.quantizer.Quantizer._search", _lookup_with_the_new_weight)
    ],
    "statistics of each rank": [("megatron_eve.models.towers.discriminator.sum_over_ranks", _alone)],
}
