"""The parameters that EVE adds to a language model: their names, and how many they are."""

from __future__ import annotations

from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.models.eve.geometry import PATCH_VALUES
from megatron_eve.models.family import FRONT_END, PartCounts

# A part that a folder of weights may lack: the layer that trains with the teacher.
ALIGNING_LAYER = "aligning layer"

# The front end is the patch embedding and the projector; the projections of intermediate features belong to the
# aligning layer.
PARTS = {
    FRONT_END: ("vision_model.*",),
    ALIGNING_LAYER: ("input_tap.*", "decoder.layers.*.tap.*", "aligning_layer.*"),
}


def parameter_counts(model: ModelConfig, vision: EVEConfig) -> PartCounts:
    """See `ModelFamily.parameter_counts`.

    The first stage has the patch embedding and the projector, the last one the patch aligning layer. Its projections
    are all counted there, though those of earlier depths stand on the stages of their layers.
    """
    width, patches, teacher = model.hidden_size, vision.patch_embedding_size, vision.teacher_hidden_size
    attention = 4 * patches**2 + 5 * patches  # queries, keys and values, output and its bias, two LayerNorms
    front_end = PATCH_VALUES * patches + 2 * patches + 2 * attention
    front_end += patches * width + width + width**2 + width
    depths = len(vision.tap_depths(model.num_layers))
    aligning = depths * (2 * width + width * teacher) + (width + 1) * teacher + (teacher + 1) * teacher
    return PartCounts(front_end, aligning if vision.patch_aligning else 0)
