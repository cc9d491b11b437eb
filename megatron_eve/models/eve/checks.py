"""EVE's settings: which cannot be, each with its flag and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_eve.config.bounds import at_least_one
from megatron_eve.config.errors import ConfigError
from megatron_eve.config.schema import RunConfig
from megatron_eve.models.eve.config import EVEConfig


def check_sizes(vision: EVEConfig) -> Iterator[str]:
    """Errors in the sizes of the patch embedding, of images and of the aligning layer."""
    yield from at_least_one(
        vision, "patch_embedding_size", "patch_embedding_heads", "image_size", "teacher_size",
        "teacher_hidden_size", "aligning_heads", "tap_interval",
    )  # fmt: skip
    if vision.patch_embedding_heads > 0 and vision.patch_embedding_size % vision.patch_embedding_heads:
        yield (
            f"--patch-embedding-size {vision.patch_embedding_size}: not divisible by "
            f"--patch-embedding-heads {vision.patch_embedding_heads}"
        )
    if vision.teacher_size > 0 and (
        vision.teacher_size % 14 or vision.image_size % (2 * vision.teacher_size)
    ):
        yield (
            f"--image-size {vision.image_size}: must be an even multiple of --teacher-size {vision.teacher_size}, "
            "itself a multiple of 14 (672 or 1344 with 336)"
        )


def check_alignment(config: RunConfig) -> Iterator[str]:
    """Errors in the settings of the aligning layer and of its teacher."""
    vision: EVEConfig = config.vision
    layers = config.model.num_layers
    if not vision.patch_aligning:
        if vision.teacher_model:
            yield "--teacher-model: only used with --patch-aligning; add that, or leave the teacher out"
        return
    if not vision.align_loss_weight > 0:
        yield (
            f"--align-loss-weight {vision.align_loss_weight}: must be positive; --no-patch-aligning trains "
            "without the aligning layer"
        )
    if min(vision.teacher_hidden_size, vision.aligning_heads, vision.tap_interval) > 0:
        if vision.teacher_hidden_size % vision.aligning_heads:
            yield (
                f"--teacher-hidden-size {vision.teacher_hidden_size}: not divisible by "
                f"--aligning-heads {vision.aligning_heads}"
            )
        if layers < vision.tap_interval:
            yield (
                f"--tap-interval {vision.tap_interval}: {layers} layers have no second depth; choose a "
                "smaller interval"
            )
    if not vision.teacher_model:
        yield (
            "--patch-aligning: name the teacher's folder with --teacher-model (CLIP ViT-L/14-336 in Hugging Face "
            "layout), or train without it: --no-patch-aligning"
        )
    else:
        yield from _teacher(Path(vision.teacher_model), config)


def _teacher(folder: Path, config: RunConfig) -> Iterator[str]:
    """Does the folder hold a vision tower of the width that the model was told?"""
    try:
        tower = config.vision.tower()
    except ConfigError as error:
        yield str(error)
        return
    if not [path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)]:
        yield f"--teacher-model {folder}: no weights there (*.safetensors or *.bin); copy the folder again"
    if tower.hidden_size != config.vision.teacher_hidden_size:
        yield (
            f"--teacher-hidden-size {config.vision.teacher_hidden_size}: the tower in {folder} is "
            f"{tower.hidden_size} wide; set it to {tower.hidden_size}"
        )
    state = config.vision.teacher_hidden_state
    if not -tower.num_layers - 1 <= state <= tower.num_layers:
        yield (
            f"--teacher-hidden-state {state}: the tower in {folder} has {tower.num_layers + 1} of them; "
            "-2 is the last but one"
        )
