"""How many parameters VILA adds to a language model."""

from __future__ import annotations

from megatron_eve.config.schema import RunConfig
from megatron_eve.models.family import PartCounts


def parameter_counts(config: RunConfig) -> PartCounts:
    """See `ModelFamily.parameter_counts`."""
    vision, hidden = config.vision, config.model.hidden_size
    width, inner = vision.vision_hidden_size, vision.vision_ffn_hidden_size
    layer = 4 * (width**2 + width) + 2 * width * inner + width + inner + 4 * width
    return PartCounts(vision.vision_num_layers * layer + width * hidden + hidden**2, 0)
