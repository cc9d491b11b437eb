"""What EVE compares of a checkpoint with a run, without one being loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_eve.config import RunConfig
from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.models.eve.family import FAMILY

TEACHER = {"path": "clip", "sha256": {"model.safetensors": "ab"}}
ALIGNED = RunConfig(vision=EVEConfig(patch_aligning=True, teacher_model="clip"))
PLAIN = RunConfig()


def saved(config: RunConfig, **frozen: Any) -> dict[str, Any]:
    return {"config": config.to_dict(), **frozen}


def with_vision(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, vision=replace(config.vision, **changes))


@pytest.mark.parametrize("key", ["frozen", "teacher"])  # the latter of versions with one family
def test_the_teacher_is_compared_by_its_hashes(key: str) -> None:
    before = saved(ALIGNED, **{key: TEACHER})
    moved = {**TEACHER, "path": "elsewhere"}
    assert not list(FAMILY.check_resume(before, with_vision(ALIGNED, teacher_model="elsewhere"), moved))
    assert not list(FAMILY.check_resume(before, ALIGNED, None))  # not known yet
    other = {"path": "other", "sha256": {"model.safetensors": "cd"}}
    (told,) = FAMILY.check_resume(before, ALIGNED, other)
    assert told.startswith(
        "was made with the teacher clip, whose model.safetensors has sha256 ab; that of other has"
    )
    (told,) = FAMILY.check_resume(before, with_vision(ALIGNED, teacher_hidden_state=-1), TEACHER)
    assert told.startswith(
        "was made with --teacher-hidden-state -2, this run has -1; resume with the same, or start"
    )


def test_sizes_and_the_aligning_layer_of_a_resumed_run() -> None:
    told = list(FAMILY.check_resume(saved(ALIGNED), with_vision(PLAIN, image_size=448), None))
    assert told == [
        "was made with --image-size 224, this run has 448; use the same --preset or recipe, or another checkpoint",
        "was made with --patch-aligning; resume with it, or start anew from its weights with --pretrained-checkpoint",
    ]
    assert not list(FAMILY.check_resume(saved(PLAIN), with_vision(PLAIN, align_loss_weight=2.0), None))


def test_a_start_from_weights() -> None:
    """Image sizes change no weight, and sizes of the aligning layer matter where both have one."""
    larger = {"image_size": 448, "teacher_size": 224}
    assert not list(FAMILY.check_weights(saved(PLAIN), with_vision(PLAIN, **larger, aligning_heads=4)))
    assert not list(FAMILY.check_weights(saved(PLAIN), with_vision(ALIGNED, aligning_heads=4)))
    (told,) = FAMILY.check_weights(saved(ALIGNED), with_vision(ALIGNED, **larger, aligning_heads=4))
    assert told.startswith("was made with --aligning-heads 8, this run has 4")
    (told,) = FAMILY.check_weights(saved(PLAIN), with_vision(PLAIN, patch_embedding_size=16))
    assert told.startswith("was made with --patch-embedding-size 32, this run has 16")
    assert list(FAMILY.missing_parts(saved(PLAIN), ALIGNED)) == ["aligning layer"]
    assert not FAMILY.missing_parts(saved(ALIGNED), ALIGNED)
    assert not FAMILY.missing_parts(saved(PLAIN), PLAIN)
