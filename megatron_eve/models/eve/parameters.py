"""Names of the parameters that EVE adds to a language model."""

from __future__ import annotations

from megatron_eve.models.family import FRONT_END

# A part that a folder of weights may lack: the layer that trains with the teacher.
ALIGNING_LAYER = "aligning layer"

# The front end is the patch embedding and the projector; the projections of intermediate features belong to the
# aligning layer.
PARTS = {
    FRONT_END: ("vision_model.*",),
    ALIGNING_LAYER: ("input_tap.*", "decoder.layers.*.tap.*", "aligning_layer.*"),
}
