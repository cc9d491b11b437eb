"""Names of the parameters that EVE adds to a language model."""

from __future__ import annotations

from megatron_eve.models.family import matches

# Parts of the model, as `ModelFamily.parts` names them.
FRONT_END, ALIGNING_LAYER = "front end", "aligning layer"

# The front end is the patch embedding and the projector; the taps of the decoder's depths belong to the aligning layer.
PARTS = {
    FRONT_END: ("vision_model.*",),
    ALIGNING_LAYER: ("input_tap.*", "decoder.layers.*.tap.*", "aligning_layer.*"),
}


def is_aligning(name: str) -> bool:
    """Does a parameter of this name, local or global, belong to the aligning layer or its taps?"""
    return matches(name, PARTS[ALIGNING_LAYER])


def parts_lacking(language_model: bool, aligned: bool) -> tuple[str, ...]:
    """Parts of the model that a folder of weights lacks.

    Args:
        language_model: the folder holds a language model alone.
        aligned: the folder holds an aligning layer.
    """
    return (FRONT_END,) * language_model + (ALIGNING_LAYER,) * (not aligned)
