"""The toy's settings: the section `vision` of a run's configuration, and sizes of models by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.family import Preset


@dataclass(frozen=True)
class ToyConfig:
    """The size of pictures and of patches, and the weight of the colour loss."""

    # Unknown keys in a recipe are errors.
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    toy_image_size: int = 64
    """Pixels of a picture's long side as the model sees it."""
    toy_patch_size: int = 16
    """Side of a patch in pixels."""
    colour_loss_weight: float = 0.5
    """Weight of the colour loss beside the language loss."""


PRESETS = {"toy_tiny": Preset(ModelConfig(num_layers=4, hidden_size=64, ffn_hidden_size=96), ToyConfig())}


def check_sizes(image_size: int, patch_size: int) -> Iterator[str]:
    """Errors in the sizes: a sentence each, with the flag and the remedy."""
    if patch_size < 1 or image_size < patch_size or image_size % patch_size:
        yield (
            f"--toy-image-size {image_size}: must be a multiple of --toy-patch-size {patch_size}, both above 0 "
            "(64 and 16, say)"
        )
