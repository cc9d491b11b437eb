"""The parameters that EVE v2 adds to a language model beside its experts: their names, and how many they are."""

from __future__ import annotations

from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.eve2.config import EVE2Config
from megatron_eve.models.eve2.geometry import MERGE, PATCH_VALUES
from megatron_eve.models.family import FRONT_END, PartCounts

PARTS = {FRONT_END: ("vision_model.*",)}


def parameter_counts(model: ModelConfig, vision: EVE2Config) -> PartCounts:
    """See `ModelFamily.parameter_counts`: two convolutions with biases, class and split embedding."""
    between, width = vision.patch_embedding_size, model.hidden_size
    return PartCounts((PATCH_VALUES + 1) * between + (MERGE**2 * between + 1) * width + 2 * width, 0)
