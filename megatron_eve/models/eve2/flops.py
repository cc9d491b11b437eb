"""FLOPs of what EVE v2 adds to the decoder, for its count of a step (see `training/monitoring/flops.py`)."""

from __future__ import annotations

from megatron_eve.models.eve2.geometry import MERGE, PATCH_VALUES
from megatron_eve.models.family import ModelSettings
from megatron_eve.models.flops import FROM_PIXELS, TRAINED, matrix
from megatron_eve.models.model_parts import FamilyFlops, Work


def eve2_flops(settings: ModelSettings, work: Work) -> FamilyFlops:
    """FLOPs of a step, forward and backward: "patch_embedding", its two convolutions, which train in every stage.

    Experts cost nothing beside the decoder: each row goes through one set of weights.

    Args:
        settings: sizes.
        work: what the step holds, on all ranks.
    """
    between, width = settings.vision.patch_embedding_size, settings.model.hidden_size
    first = MERGE**2 * work.merged_patches * matrix(PATCH_VALUES, between)
    second = work.merged_patches * matrix(MERGE**2 * between, width)
    return FamilyFlops({"patch_embedding": FROM_PIXELS * first + TRAINED * second}, {})
