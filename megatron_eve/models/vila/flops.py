"""FLOPs of what VILA adds to the decoder, for its count of a step (see `training/monitoring/flops.py`).

As published: every picture goes through the layers of the tower up to the selected one, with full attention, and all
features through the projector. A frozen tower runs forward only, and a projector that begins with a matrix then needs
no gradient of its input (one that begins with a norm does: the norm trains). Resizing, norms and activations are not
counted.
"""

from __future__ import annotations

from megatron_eve.models.family import ModelSettings
from megatron_eve.models.flops import (
    FORWARD,
    FROM_PIXELS,
    FROZEN,
    TRAINED,
    attention,
    decoder_layer,
    matrix,
)
from megatron_eve.models.model_parts import FamilyFlops, Work
from megatron_eve.models.vila.config import VILAConfig
from megatron_eve.models.vila.geometry import projector_rows

# Blocks of the projector `qformer`, and the inner width of their MLP in units of the tower's; the paper says neither.
QFORMER_LAYERS, QFORMER_MLP = 2, 4


def vila_flops(settings: ModelSettings, work: Work) -> FamilyFlops:
    """FLOPs of a step, forward and backward: "tower" and "projector", which trains in every stage.

    Args:
        settings: sizes, and whether the tower is frozen.
        work: what the step holds, on all ranks; its pictures count, not the rows that were cut off.
    """
    vision: VILAConfig = settings.vision
    parts = {
        "tower": tower_flops(vision),
        "projector": projector_flops(vision, settings.model.hidden_size),
    }
    return FamilyFlops({part: work.images * flops for part, flops in parts.items()}, {})


def image_work(settings: ModelSettings, *, decoder_trains: bool) -> float:
    """See `ModelFamily.image_work`.

    Args:
        settings: sizes, and whether the tower is frozen.
        decoder_trains: in the stage of the run.
    """
    vision, model = settings.vision, settings.model
    token = (TRAINED if decoder_trains else FROZEN) * model.num_layers * decoder_layer(model)
    return (tower_flops(vision) + projector_flops(vision, model.hidden_size)) / token


def tower_flops(vision: VILAConfig) -> int:
    """FLOPs of one picture in the tower, forward and backward."""
    width, patches = vision.vision_hidden_size, vision.grid**2
    tokens = patches + (vision.vision_model_type == "clip")  # the class token
    convolution = patches * matrix(3 * vision.vision_patch_size**2, width)
    layer = tokens * (4 * matrix(width, width) + 2 * matrix(width, vision.vision_ffn_hidden_size))
    layer += attention(tokens**2, width)
    if vision.freeze_ViT:
        return FORWARD * (convolution + vision.tower_layers * layer)
    return FROM_PIXELS * convolution + TRAINED * vision.tower_layers * layer


def projector_flops(vision: VILAConfig, hidden: int) -> int:
    """FLOPs of one picture in the projector, forward and backward.

    Args:
        vision: settings.
        hidden: width of the decoder.
    """
    if vision.projector_type == "qformer":
        return TRAINED * _qformer(vision, hidden)
    rows, sizes = projector_matrices(vision, hidden)
    first, *others = [rows * matrix(*size) for size in sizes]
    reads_features = vision.freeze_ViT and vision.block == 1  # else a norm, which trains, stands in between
    # Behind a frozen tower a matrix is like one behind pixels.
    return (FROM_PIXELS if reads_features else TRAINED) * first + TRAINED * sum(others)


def projector_matrices(vision: VILAConfig, hidden: int) -> tuple[int, list[tuple[int, int]]]:
    """Rows of a picture in a projector without attention, and inputs and outputs of its matrices, in order."""
    assert vision.projector_type != "qformer", "it attends"
    rows = projector_rows(vision.projector_type, vision.grid, vision.qformer_num_queries)
    width = vision.block**2 * vision.vision_hidden_size
    last = (hidden, hidden)
    match vision.projector_type:
        case "linear":
            return rows, [(width, hidden)]
        case "mlp3x_gelu":
            return rows, [(width, hidden), last, last]
        case "mlp_downsample_3x3_fix":
            return rows, [(width, width // 3), (width // 3, hidden), last]
    return rows, [(width, hidden), last]


def _qformer(vision: VILAConfig, hidden: int) -> int:
    """FLOPs of one picture, forward: queries attend to each other and to the features, then an affine map."""
    width, queries, features = vision.vision_hidden_size, vision.qformer_num_queries, vision.grid**2
    square = matrix(width, width)
    among_queries = queries * 4 * square + attention(queries**2, width)
    to_features = queries * 2 * square + features * 2 * square + attention(queries * features, width)
    mlp = queries * 2 * matrix(width, QFORMER_MLP * width)
    return QFORMER_LAYERS * (among_queries + to_features + mlp) + queries * matrix(width, hidden)
