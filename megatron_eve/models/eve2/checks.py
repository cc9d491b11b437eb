"""Errors in EVE v2's settings, and in what a checkpoint was made with. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_eve.config.errors import at_least_one
from megatron_eve.config.schema import RunConfig
from megatron_eve.models.eve2.config import EVE2Config
from megatron_eve.models.eve2.geometry import image_setting_errors, image_settings
from megatron_eve.models.family import size_differences

# Sizes of pictures change no weight: stages differ in them.
_SHAPELESS = ("max_image_side", "image_resize")


def check_sizes(vision: EVE2Config) -> Iterator[str]:
    """See `ModelFamily.check_sizes`."""
    yield from at_least_one(vision, "patch_embedding_size")
    yield from image_setting_errors(image_settings(vision))


def check_stage(config: RunConfig) -> Iterator[str]:
    """A stage and a decoder that do not go together; see `ModelFamily.check`."""
    if config.training.stage == 1 and not config.model.modality_experts:
        yield (
            "--stage 1: trains experts, and this decoder has none; add --modality-experts, or train stage 0, which is "
            "for a decoder without them"
        )


def check_weights(saved: dict[str, Any], config: RunConfig) -> Iterator[str]:
    """See `ModelFamily.check_weights`: pictures may be larger than before."""
    return size_differences(saved["config"].get("vision", {}), config.vision, _SHAPELESS)
