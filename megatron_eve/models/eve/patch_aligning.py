"""The patch aligning layer of EVE (arXiv 2406.11832, section 3.1): what several depths say together about a patch.

For each visual token the last depth asks, the earlier ones answer: a small attention over depths, whose result
should look like the frozen teacher's feature of the same patch. Training only; `vision_tower_compressor` of the
published model. Every rank works on the tokens it holds, so all weights are replicated and their gradients summed
over the ranks that split the tokens.

Shapes: R = rows of features on this rank, D = decoder width, K = teacher width, J = earlier depths, H = heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megatron_eve.models.decoder.intermediate_features import (
    FeatureProjection,
    FeatureRows,
    mark_sequence_parallel,
)
from megatron_eve.models.eve.config import EVEConfig


class AligningInputs(NamedTuple):
    """What the aligning layer gets of a pack, on the device; R = its rows on this rank.

    Attributes:
        targets: [R, K], the teacher's features.
        weights: float32 [R], one over the teacher patches of each row's image; 0 for rows that belong to none.
    """

    targets: torch.Tensor
    weights: torch.Tensor


class PatchAligningLayer(torch.nn.Module):
    """Attention over depths and the two output maps.

    The scale is K ** -0.5, of the full width and not of a head, as published; keys are the values, without further
    projections; the query's own depth is not among them.
    """

    def __init__(self, config: TransformerConfig, vision: EVEConfig) -> None:
        super().__init__()
        width = vision.teacher_hidden_size
        self.heads = vision.aligning_heads
        self.query_tap = FeatureProjection(config, width)
        self.input_layer = torch.nn.Linear(config.hidden_size, width, dtype=config.params_dtype)
        self.output_layer = torch.nn.Linear(width, width, dtype=config.params_dtype)
        mark_sequence_parallel(self, config)

    def forward(
        self, hidden: torch.Tensor, features: torch.Tensor, rows: FeatureRows, inputs: AligningInputs
    ) -> torch.Tensor:
        """This rank's part of the aligning loss, a scalar; see `FamilyObjective.head`."""
        return aligning_loss(self.predict(rows.take(hidden), features), inputs.targets, inputs.weights)

    def predict(self, last: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Predict the teacher's features.

        Args:
            last: [R, D], the last depth, behind the final norm.
            features: [J, R, K], the earlier depths, projected; their order does not matter.

        Returns:
            [R, K].
        """
        query = self.query_tap(last).unflatten(-1, (self.heads, -1))  # (R, H, K / H)
        keys = features.unflatten(-1, (self.heads, -1))  # (J, R, H, K / H)
        logits = (query * keys).sum(-1, keepdim=True) * features.shape[-1] ** -0.5  # (J, R, H, 1)
        weights = torch.softmax(logits, dim=0)
        fused = (weights * keys).sum(0).flatten(1)  # (R, K)
        return self.input_layer(last) + self.output_layer(fused)


def aligning_loss(predictions: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over images of 1 - mean cosine, this rank's part of it.

    Args:
        predictions: [R, K].
        targets: [R, K], the teacher's features.
        weights: float32 [R], one over the teacher patches of the row's image; 0 for rows that belong to none.

    Returns:
        Scalar in float32 (float64 for float64 predictions). The ranks' parts add up.
    """
    wide = torch.float64 if predictions.dtype == torch.float64 else torch.float32
    cosine = functional.cosine_similarity(predictions.to(wide), targets.to(wide), dim=-1, eps=1e-8)
    return ((1 - cosine) * weights).sum()
