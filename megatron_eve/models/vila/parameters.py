"""How many parameters VILA adds to a language model."""

from __future__ import annotations

from megatron_eve.config.schema import RunConfig
from megatron_eve.models.family import PartCounts
from megatron_eve.models.vila.config import VILAConfig
from megatron_eve.models.vila.flops import QFORMER_LAYERS, QFORMER_MLP, projector_matrices


def parameter_counts(config: RunConfig) -> PartCounts:
    """See `ModelFamily.parameter_counts`: the tower whole on each rank, the projector in tensor-parallel shares."""
    vision: VILAConfig = config.vision
    trained, kept = tower_parameters(vision)
    projector = projector_parameters(
        vision, config.model.hidden_size, config.parallel.tensor_model_parallel_size
    )
    frozen = trained + kept if vision.freeze_ViT else kept
    return PartCounts(trained + kept + projector, 0, frozen)


def tower_parameters(vision: VILAConfig) -> tuple[int, int]:
    """Parameters of the tower up to the selected hidden state, and of what is kept behind it and never trains."""
    width, inner, clip = (
        vision.vision_hidden_size, vision.vision_ffn_hidden_size, vision.vision_model_type == "clip",
    )  # fmt: skip
    norm = 2 * width
    attention = 4 * (width**2 + width)
    mlp = 2 * width * inner + inner + width
    layer = attention + mlp + 2 * norm
    patches = vision.grid**2
    # CLIP's class token and its position, no bias of the convolution, and a norm in front of the layers.
    embeddings = (3 * vision.vision_patch_size**2 + patches) * width
    embeddings += 2 * width + norm if clip else width
    # Behind the layers a norm; SigLIP has a pooling head: a query, attention, a norm and an MLP.
    head = 0 if clip else width + attention + norm + mlp
    run = vision.tower_layers
    return embeddings + run * layer, (vision.vision_num_layers - run) * layer + norm + head


def projector_parameters(vision: VILAConfig, hidden: int, tensor_parallel: int = 1) -> int:
    """Parameters of the projector on one rank.

    Args:
        vision: settings.
        hidden: width of the decoder.
        tensor_parallel: ranks that share the matrices; norms, and the blocks of `qformer`, are whole on each.
    """
    width = vision.vision_hidden_size
    if vision.projector_type == "qformer":
        inner = QFORMER_MLP * width
        block = 3 * 2 * width + 8 * (width**2 + width) + 2 * width * inner + inner + width
        encoder = (width + 1) * hidden // tensor_parallel
        return vision.qformer_num_queries * width + 2 * 2 * width + QFORMER_LAYERS * block + encoder
    _, sizes = projector_matrices(vision, hidden)
    block = vision.block**2 if vision.block > 1 else 0
    norms = 2 * block * width + (2 * 3 * width if vision.block == 3 else 0)
    if vision.projector_type == "linear":
        return (width + 1) * hidden // tensor_parallel
    # The last matrix of the MLP is split by its inputs, so that its bias is whole on each rank.
    *columns, (inputs, outputs) = sizes
    split = sum((first + 1) * second for first, second in columns) + inputs * outputs
    return norms + split // tensor_parallel + outputs
