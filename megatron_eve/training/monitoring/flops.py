"""Model FLOPs of one optimizer step, for TFLOP/s/GPU and MFU: the whole model, at true lengths.

What is counted is what the published model (EVE, arXiv 2406.11832, sections 3.1 and 3.2) has to compute, whatever
the code, the layout or the packing does about it:

- Matrix products and attention products, a multiply-add as 2. Norms, softmax, activations, biases, poolings
  and losses are not counted, nor are lookups.
- Forward and backward. Backward is twice forward: the gradient of the input and that of the weight. A frozen
  matrix has only the first, pixels have none, and the teacher runs forward only. Attention products have no weight
  but two inputs, so that their backward is twice forward in a frozen decoder too. Recomputation is never counted.
- Tokens of samples, not of packs: no padding. Causal attention has the pairs that exist, ``n (n + 1) / 2`` for a
  sample of n tokens. The output layer has the rows with a label, and the tokenizer's own vocabulary.
- The patch embedding in its published form. The code computes about a third of that at the width of EVE-7B
  (`models/eve/patch_embedding.py`); an identity that saves work must not lower the figure.
- In stage 1 the gradient passes through the frozen decoder at every token, as in a pack that holds an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_eve.config.schema import ModelConfig
from megatron_eve.data.dataset import VisionDataset
from megatron_eve.models.family import ModelSettings

PATCH_VALUES = 3 * 14 * 14
CELL_PATCHES = 4
# What a product costs over a step, in units of its forward pass.
_TRAINED = 3  # forward, gradient of the input and of the weight, or of both inputs of an attention product
_FROZEN = 2  # forward, gradient of the input
_FROM_PIXELS = 2  # forward, gradient of the weight
_FORWARD = 1


@dataclass(frozen=True)
class Work:
    """What a step holds, over all data-parallel ranks and without any padding."""

    tokens: int
    """Positions of the decoder, images expanded."""
    attended: int
    """Query-key pairs of causal attention: the sum over samples of length * (length + 1) / 2."""
    labels: int
    """Rows that reach the output layer."""
    images: int
    cells: int
    """Cells of 2 x 2 patches: visual tokens but for each image's CLS and row ends."""
    visual_rows: int
    """Rows of the projector: the sum over images of 1 + rows * (columns + 1)."""


@dataclass(frozen=True)
class TeacherSizes:
    """A vision tower as it is run: a plain ViT (CLIP) with full attention over its padded square."""

    layers: int
    """Layers that are run: 23 of the 24 of CLIP ViT-L/14-336, whose target is the last but one's output."""
    hidden_size: int
    """Width K."""
    ffn_hidden_size: int
    """Inner width of its MLP of two matrices; for a gated one (three) say 1.5 times its inner width."""
    tokens: int
    """Tokens of an image, of which one is CLS and the others are patches: 577 for CLIP ViT-L/14-336."""
    patch_values: int = PATCH_VALUES
    """Values of a patch: 3 * 14 * 14."""


def step_work(dataset: VisionDataset, sample_ids: Sequence[int] | NDArray[np.int64]) -> Work:
    """Count what the given samples hold, from the manifest alone: no text and no image is read.

    Args:
        dataset: where the samples lie.
        sample_ids: [n] rows of the dataset, as in `Step.sample_ids`; one that comes twice counts twice.
    """
    ids = np.asarray(sample_ids, dtype=np.int64)
    samples, lengths = dataset.samples[ids], dataset.lengths(ids)
    plans = [
        dataset.image_plan(image)
        for first, count in zip(samples["first_image"].tolist(), samples["num_images"].tolist(), strict=True)
        for image in range(first, first + count)
    ]
    return Work(
        tokens=int(lengths.sum()),
        attended=int((lengths * (lengths + 1) // 2).sum()),
        labels=int(samples["labels"].sum()),
        images=len(plans),
        cells=sum(plan.grid[0] * plan.grid[1] for plan in plans),
        visual_rows=sum(plan.rows for plan in plans),
    )


def model_flops(
    settings: ModelSettings, work: Work, *, decoder_trains: bool, teacher: TeacherSizes | None
) -> dict[str, float]:
    """FLOPs of a step, forward and backward, by part of the model (EVE, arXiv 2406.11832); add them up for the total.

    The conventions stand at the top of this module. The time of a step in seconds times the number of GPUs divides
    the sum to FLOP/s/GPU.

    Args:
        settings: sizes.
        work: what the step holds, on all ranks.
        decoder_trains: False in stage 1, where decoder, token embedding and output layer are frozen.
        teacher: sizes of the teacher; None trains without the patch aligning layer, so that "taps", "aligning" and
            "teacher" are 0.

    Returns:
        "patch_embedding" with both its attentions, "projector", "decoder" (matrices), "attention" (the decoder's),
        "output_layer", "taps" (one projection for each aligned depth, the query's among them), "aligning"
        (attention over depths, input and output layer) and "teacher", in FLOPs.

    Raises:
        ValueError: with a teacher, cells that do not pool to whole teacher patches: the work was counted for another
            image size than the model's.
    """
    model, vision = settings.model, settings.vision
    decoder = _TRAINED if decoder_trains else _FROZEN
    parts = {
        "patch_embedding": _patch_embedding(vision.patch_embedding_size, work),
        "projector": _TRAINED
        * work.visual_rows
        * (
            _matrix(vision.patch_embedding_size, model.hidden_size)
            + _matrix(model.hidden_size, model.hidden_size)
        ),
        "decoder": decoder * work.tokens * model.num_layers * _decoder_layer(model),
        "attention": _TRAINED * model.num_layers * _attention(work.attended, model.hidden_size),
        "output_layer": decoder * work.labels * _matrix(model.hidden_size, model.vocab_size),
        "taps": 0,
        "aligning": 0,
        "teacher": 0,
    }
    if teacher is not None:
        parts |= _alignment(settings, work) | {"teacher": work.images * _teacher(teacher)}
    return {part: float(flops) for part, flops in parts.items()}


def _matrix(inputs: int, outputs: int) -> int:
    """FLOPs of one row times a matrix."""
    return 2 * inputs * outputs


def _attention(pairs: int, width: int) -> int:
    """FLOPs of the two products of attention, scores and weighted values: heads together are `width` wide."""
    return 2 * (2 * pairs * width)


def _patch_embedding(width: int, work: Work) -> int:
    """Section 3.1 in its published form: every patch is embedded, normed and projected to a key and a value."""
    patches = CELL_PATCHES * work.cells
    convolution = patches * _matrix(PATCH_VALUES, width)
    query = output = _matrix(width, width)
    keys_values = _matrix(width, 2 * width)
    # A cell asks its four patches; then the class embedding, once for each image, asks all of the image's cells.
    local_attention = work.cells * (query + output) + patches * keys_values + _attention(patches, width)
    global_attention = (
        work.images * (query + output) + work.cells * keys_values + _attention(work.cells, width)
    )
    return _FROM_PIXELS * convolution + _TRAINED * (local_attention + global_attention)


def _decoder_layer(model: ModelConfig) -> int:
    """FLOPs of one token through the matrices of a layer, forward: query, key, value, output, gated MLP."""
    groups = model.num_query_groups or model.num_attention_heads
    keys = model.hidden_size // model.num_attention_heads * groups
    return (
        2 * _matrix(model.hidden_size, model.hidden_size)
        + 2 * _matrix(model.hidden_size, keys)
        + 3 * _matrix(model.hidden_size, model.ffn_hidden_size)
    )


def _alignment(settings: ModelSettings, work: Work) -> dict[str, int]:
    """Section 3.2's patch aligning layer; hidden states are pooled to teacher patches before anything else."""
    model, vision = settings.model, settings.vision
    rows, rest = divmod(work.cells, vision.pooling**2)
    if rest:
        raise ValueError(
            f"{work.cells} cells do not pool {vision.pooling} x {vision.pooling} to teacher patches: the step was "
            f"counted for another image size than the model's {vision.image_size}; take both from one configuration"
        )
    depths, width = len(vision.tap_depths(model.num_layers)), vision.teacher_hidden_size
    project = _matrix(model.hidden_size, width)
    return {
        "taps": _TRAINED * rows * depths * project,
        # The last depth asks the others.
        "aligning": _TRAINED
        * (rows * (project + _matrix(width, width)) + _attention(rows * (depths - 1), width)),
    }


def _teacher(teacher: TeacherSizes) -> int:
    """FLOPs of one image."""
    width = teacher.hidden_size
    layer = teacher.tokens * (4 * _matrix(width, width) + 2 * _matrix(width, teacher.ffn_hidden_size))
    layer += _attention(teacher.tokens**2, width)
    patches = (teacher.tokens - 1) * _matrix(teacher.patch_values, width)
    return _FORWARD * (patches + teacher.layers * layer)
