"""The parameters that VILA-U adds to a language model: their names, and how many they are."""

from __future__ import annotations

from megatron_eve.config.schema import RunConfig
from megatron_eve.models.family import PartCounts
from megatron_eve.models.vila_u.config import VILAUConfig

CODEBOOK, PROJECTOR, DEPTH_HEAD = "codebook", "projector", "depth transformer"
PARTS = {
    # On the first stage and on the last one; never trained.
    CODEBOOK: ("vision_model.codebook.*", "visual_head.codebook.*"),
    PROJECTOR: ("vision_model.projector.*",),
    DEPTH_HEAD: ("visual_head.transformer.*",),
}


def parameter_counts(config: RunConfig) -> PartCounts:
    """See `ModelFamily.parameter_counts`; the codebook, which is whole on each rank, stands on both stages."""
    vision: VILAUConfig = config.vision
    tensor, hidden = config.parallel.tensor_model_parallel_size, config.model.hidden_size
    codebook = vision.codebooks * (vision.visual_codebook_size + 1) * vision.code_vector_size
    split, whole = projector_parameters(vision, hidden)
    front_end = codebook + split // tensor + whole
    split, whole = depth_parameters(vision, hidden)
    return PartCounts(front_end, codebook + split // tensor + whole, frozen=codebook, last_frozen=codebook)


def projector_parameters(vision: VILAUConfig, hidden: int) -> tuple[int, int]:
    """Parameters of the projector that tensor-parallel ranks share, and those that each has whole."""
    return (vision.code_vector_size + 1) * hidden + hidden * hidden, hidden


def depth_parameters(vision: VILAUConfig, hidden: int) -> tuple[int, int]:
    """Parameters of the depth transformer that tensor-parallel ranks share, and those that each has whole.

    Shared are the matrices of its layers and its classifier; of those that are split by their inputs the bias is whole.
    """
    width, classes = vision.depth_hidden_size, vision.visual_codebook_size
    layer = 3 * (width + 1) * width + width * width + (width + 1) * 4 * width + 4 * width * width
    norms_and_biases = 2 * 2 * width + 2 * width
    inputs = (hidden + 1) * width + (vision.code_vector_size + 1) * width + vision.codes_per_position * width
    split = vision.depth_num_layers * layer + (width + 1) * classes
    return split, vision.depth_num_layers * norms_and_biases + inputs + 2 * width
