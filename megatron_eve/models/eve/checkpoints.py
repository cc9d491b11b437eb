"""May a run of EVE go on from a checkpoint, or start from its weights? Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_eve.config.schema import RunConfig
from megatron_eve.models.eve.config import TRAINING_SETTINGS, EVEConfig
from megatron_eve.models.eve.parameters import ALIGNING_LAYER
from megatron_eve.models.family import size_differences

# Sizes that change no weight: the HD model starts from 672-pixel weights.
_SHAPELESS = ("image_size", "teacher_size")
# Sizes of the aligning layer, which matter only where there is one.
_ALIGNING = ("teacher_hidden_size", "aligning_heads", "tap_interval")
_ANEW = "start anew from its weights with --pretrained-checkpoint"


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
