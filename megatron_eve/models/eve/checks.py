"""Which settings of EVE cannot be, and whether a run may go on from a checkpoint or its weights. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_eve.config.errors import ConfigError, at_least_one
from megatron_eve.config.schema import RunConfig
from megatron_eve.models.eve.config import TRAINING_SETTINGS, EVEConfig
from megatron_eve.models.eve.parameters import ALIGNING_LAYER
from megatron_eve.models.family import size_differences

# Sizes that change no weight: the HD model starts from 672-pixel weights.
_SHAPELESS = ("image_size", "teacher_size")
# Sizes of the aligning layer, which matter only where there is one.
_ALIGNING = ("teacher_hidden_size", "aligning_heads", "tap_interval")
_ANEW = "start anew from its weights with --pretrained-checkpoint"


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


def check_resume(saved: dict[str, Any], config: RunConfig, teacher: dict[str, Any] | None) -> Iterator[str]:
    """See `ModelFamily.check_resume`: a resumed run goes on aligning with the very teacher, wherever that lies now."""
    before, vision = saved["config"].get("vision", {}), config.vision
    yield from size_differences(before, vision, TRAINING_SETTINGS)
    if _aligned(saved) != vision.patch_aligning:
        flag = "--patch-aligning" if _aligned(saved) else "--no-patch-aligning"
        yield f"was made with {flag}; resume with it, or {_ANEW}"
    known = saved.get("frozen", saved.get("teacher"))  # as versions with one family called it
    if not (known and teacher):
        return
    if before["teacher_hidden_state"] != vision.teacher_hidden_state:
        yield (
            f"was made with --teacher-hidden-state {before['teacher_hidden_state']}, this run has "
            f"{vision.teacher_hidden_state}; resume with the same, or {_ANEW}"
        )
    for name, sha256 in known["sha256"].items():
        if teacher["sha256"].get(name) != sha256:
            yield (
                f"was made with the teacher {known['path']}, whose {name} has sha256 {sha256}; that of "
                f"{teacher['path']} has {teacher['sha256'].get(name)}: resume with the same --teacher-model, or {_ANEW}"
            )


def check_weights(saved: dict[str, Any], config: RunConfig) -> Iterator[str]:
    """See `ModelFamily.check_weights`."""
    vision: EVEConfig = config.vision
    both_aligned = _aligned(saved) and vision.patch_aligning
    ignore = (*TRAINING_SETTINGS, *_SHAPELESS, *(() if both_aligned else _ALIGNING))
    return size_differences(saved["config"].get("vision", {}), vision, ignore)


def missing_parts(saved: dict[str, Any], config: RunConfig) -> Mapping[str, str]:
    """See `ModelFamily.missing_parts`."""
    if _aligned(saved) or not config.vision.patch_aligning:
        return {}
    return {ALIGNING_LAYER: "made without --patch-aligning, so the aligning layer keeps its initial weights"}


def _aligned(saved: dict[str, Any]) -> bool:
    return bool(saved["config"].get("vision", {}).get("patch_aligning"))
