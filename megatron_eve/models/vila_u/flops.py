"""FLOPs of what VILA-U adds to the decoder, for its count of a step (see `training/monitoring/flops.py`).

The projector reads sums of frozen codebook vectors, like a matrix behind pixels. The depth transformer runs over the D
depths of each position that is to be drawn. Sums of codebook vectors, norms, activations and losses are not counted.
"""

from __future__ import annotations

from megatron_eve.models.family import ModelSettings
from megatron_eve.models.flops import FROM_PIXELS, TRAINED, attention, decoder_layer, matrix
from megatron_eve.models.model_parts import FamilyFlops, Work
from megatron_eve.models.vila_u.config import VILAUConfig


def vila_u_flops(settings: ModelSettings, work: Work) -> FamilyFlops:
    """FLOPs of a step, forward and backward: "projector" and "depth_transformer".

    Args:
        settings: sizes.
        work: what the step holds, on all ranks.
    """
    vision: VILAUConfig = settings.vision
    hidden = settings.model.hidden_size
    projector = FROM_PIXELS * matrix(vision.code_vector_size, hidden) + TRAINED * matrix(hidden, hidden)
    return FamilyFlops(
        {"projector": work.image_rows * projector},
        {"depth_transformer": work.visual_labels * position_flops(vision, hidden)},
    )


def position_flops(vision: VILAUConfig, hidden: int) -> int:
    """FLOPs of one position that is to be drawn in the depth transformer, forward and backward.

    Args:
        vision: settings.
        hidden: width of the decoder.
    """
    width, depth = vision.depth_hidden_size, vision.codes_per_position
    inputs = matrix(hidden, width) + (depth - 1) * matrix(vision.code_vector_size, width)
    layer = depth * (4 * matrix(width, width) + 2 * matrix(width, 4 * width))
    layer += attention(depth * (depth + 1) // 2, width)
    classifier = depth * matrix(width, vision.visual_codebook_size)
    return TRAINED * (inputs + vision.depth_num_layers * layer + classifier)


def visual_label_work(settings: ModelSettings) -> float:
    """What a position that is to be drawn costs in the depth transformer, in tokens of the decoder's matrix products,
    forward and backward."""
    token = TRAINED * settings.model.num_layers * decoder_layer(settings.model)
    return position_flops(settings.vision, settings.model.hidden_size) / token
