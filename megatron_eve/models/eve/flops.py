"""FLOPs of what EVE adds to the decoder, for its count of a step (see `training/monitoring/flops.py`).

As published (arXiv 2406.11832, sections 3.1 and 3.2), whatever the code does about it: it computes about a third of the
patch embedding at the width of EVE-7B (`patch_embedding.py`). The teacher runs forward only.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.models.eve.geometry import MERGE, PATCH_SIZE, PATCH_VALUES
from megatron_eve.models.family import ModelSettings
from megatron_eve.models.flops import FORWARD, FROM_PIXELS, TRAINED, attention, matrix
from megatron_eve.models.model_parts import FamilyFlops, Work


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


def teacher_sizes(vision: EVEConfig) -> TeacherSizes | None:
    """What the teacher costs; None without one."""
    if not vision.patch_aligning:
        return None
    tower = vision.tower()
    return TeacherSizes(
        # Hidden state 0 is the embedding; layers behind the target are not needed.
        layers=vision.teacher_hidden_state % (tower.num_layers + 1),
        hidden_size=tower.hidden_size,
        ffn_hidden_size=tower.ffn_hidden_size,
        tokens=(vision.teacher_size // PATCH_SIZE) ** 2 + 1,
        patch_values=3 * tower.patch_size**2,
    )


def eve_flops(settings: ModelSettings, work: Work, teacher: TeacherSizes | None) -> FamilyFlops:
    """FLOPs of a step, forward and backward, by part.

    Args:
        settings: sizes.
        work: what the step holds, on all ranks.
        teacher: sizes of the teacher; None trains without the patch aligning layer.

    Returns:
        Of the front end "patch_embedding" with both its attentions, and "projector"; of the objective
        "intermediate_features" (one projection for each aligned depth, the query's among them), "aligning" (attention
        over depths, input and output layer) and "teacher", 0 without one.

    Raises:
        ValueError: with a teacher, merged patches that do not pool to whole teacher patches: the work was counted for
            another image size than the model's.
    """
    width, hidden = settings.vision.patch_embedding_size, settings.model.hidden_size
    front_end = {
        "patch_embedding": _patch_embedding(width, work),
        "projector": TRAINED * work.image_rows * (matrix(width, hidden) + matrix(hidden, hidden)),
    }
    objectives = {"intermediate_features": 0, "aligning": 0, "teacher": 0}
    if teacher is not None:
        objectives = _alignment(settings, work) | {"teacher": work.images * _teacher(teacher)}
    return FamilyFlops(front_end, objectives)


def _patch_embedding(width: int, work: Work) -> int:
    """Section 3.1 in its published form: every patch is embedded, normed and projected to a key and a value."""
    patches = MERGE**2 * work.merged_patches
    convolution = patches * matrix(PATCH_VALUES, width)
    query = output = matrix(width, width)
    keys_values = matrix(width, 2 * width)
    # A merged patch asks its four patches; then the class embedding, once for each image, asks all of the image's.
    local_attention = (
        work.merged_patches * (query + output) + patches * keys_values + attention(patches, width)
    )
    global_attention = (
        work.images * (query + output)
        + work.merged_patches * keys_values
        + attention(work.merged_patches, width)
    )
    return FROM_PIXELS * convolution + TRAINED * (local_attention + global_attention)


def _alignment(settings: ModelSettings, work: Work) -> dict[str, int]:
    """Section 3.2's patch aligning layer; hidden states are pooled to teacher patches before anything else."""
    model, vision = settings.model, settings.vision
    rows, rest = divmod(work.merged_patches, vision.pooling**2)
    if rest:
        raise ValueError(
            f"{work.merged_patches} merged patches do not pool {vision.pooling} x {vision.pooling} to teacher patches: "
            f"the step was counted for another image size than the model's {vision.image_size}; "
            "take both from one configuration"
        )
    depths, width = len(vision.tap_depths(model.num_layers)), vision.teacher_hidden_size
    project = matrix(model.hidden_size, width)
    return {
        "intermediate_features": TRAINED * rows * depths * project,
        # The last depth asks the others.
        "aligning": TRAINED
        * (rows * (project + matrix(width, width)) + attention(rows * (depths - 1), width)),
    }


def _teacher(teacher: TeacherSizes) -> int:
    """FLOPs of one image."""
    width = teacher.hidden_size
    layer = teacher.tokens * (4 * matrix(width, width) + 2 * matrix(width, teacher.ffn_hidden_size))
    layer += attention(teacher.tokens**2, width)
    patches = (teacher.tokens - 1) * matrix(teacher.patch_values, width)
    return FORWARD * (patches + teacher.layers * layer)
