"""The toy as a model family: what `--family tests.families.toy.family` names. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megatron_eve.config.schema import RunConfig
from megatron_eve.models.family import (
    FRONT_END,
    ImagePlanner,
    ModelFamily,
    PartCounts,
    Preset,
    Stage,
    ViewUse,
)
from megatron_eve.models.flops import TRAINED, matrix
from megatron_eve.models.image_flags import ImageFlag, ImageSetting, ImageSettings
from megatron_eve.models.model_parts import FamilyFlops, FamilyObjective, FrontEnd, Work
from tests.families.toy.config import PRESETS, ToyConfig, check_sizes
from tests.families.toy.geometry import IMAGE_FLAGS, image_planner
from tests.families.toy.hugging_face import ToyFormat
from tests.families.toy.objective import ColourLoss

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

PARTS = {FRONT_END: ("vision_model.*",), "colour head": ("colour_head.*",)}


class ToyFamily(ModelFamily):
    """Patches as their mean colours, and a loss of the picture's mean colour."""

    name = "tests.families.toy.family"
    Config: type[Any] = ToyConfig
    presets: Mapping[str, Preset] = PRESETS
    stages: Mapping[int, Stage] = {
        1: Stage("front end", (*PARTS[FRONT_END], *PARTS["colour head"])),
        2: Stage("everything", ("*",)),
    }
    parts: Mapping[str, tuple[str, ...]] = PARTS
    image_flags: Mapping[str, ImageFlag] = IMAGE_FLAGS

    def check_sizes(self, config: RunConfig) -> Iterator[str]:
        """See `ModelFamily.check_sizes`."""
        return check_sizes(config.vision.toy_image_size, config.vision.toy_patch_size)

    def parameter_counts(self, config: RunConfig) -> PartCounts:
        """See `ModelFamily.parameter_counts`."""
        width = config.model.hidden_size
        return PartCounts(first_stage=(3 + 1) * width, last_stage=(width + 1) * 3)

    # --- model ---

    def front_end(self, config: RunConfig, transformer: TransformerConfig) -> FrontEnd:
        """See `ModelFamily.front_end`."""
        from tests.families.toy.front_end import ToyFrontEnd

        return ToyFrontEnd(transformer)

    def objectives(self, config: RunConfig) -> tuple[FamilyObjective, ...]:
        """See `ModelFamily.objectives`."""
        return (ColourLoss(config),)

    def flops(self, config: RunConfig, work: Work) -> FamilyFlops:
        """See `ModelFamily.flops`: two small matrices."""
        width = config.model.hidden_size
        return FamilyFlops(
            front_end={"projection": TRAINED * work.image_rows * matrix(3, width)},
            objectives={"colour head": TRAINED * work.image_rows * matrix(width, 3)},
        )

    # --- data ---

    def image_settings(self, config: RunConfig) -> dict[str, ImageSetting]:
        """See `ModelFamily.image_settings`."""
        return {name: getattr(config.vision, name) for name in IMAGE_FLAGS}

    def check_image_settings(self, settings: ImageSettings) -> Iterator[str]:
        """See `ModelFamily.check_image_settings`."""
        return check_sizes(int(settings["toy_image_size"]), int(settings["toy_patch_size"]))

    def image_planner(self, settings: ImageSettings) -> ImagePlanner:
        """See `ModelFamily.image_planner`."""
        return image_planner(settings)

    def views(self, config: RunConfig) -> Mapping[str, ViewUse]:
        """See `ModelFamily.views`."""
        return {"patches": ViewUse("first", shared=False), "colour": ViewUse("last", shared=True)}

    # --- Hugging Face ---

    def hugging_face(self) -> ToyFormat:
        """See `ModelFamily.hugging_face`."""
        return ToyFormat()


FAMILY: ModelFamily = ToyFamily()
