"""EVE v2 as a model family (arXiv 2502.06788): its sizes, checks and stages. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_eve.config.schema import RunConfig
from megatron_eve.models.eve2.checks import check_sizes, check_stage, check_weights
from megatron_eve.models.eve2.config import OTHER_NAMES, PRESETS, EVE2Config
from megatron_eve.models.eve2.flops import eve2_flops
from megatron_eve.models.eve2.geometry import IMAGE_FLAGS, image_setting_errors, image_settings, planner
from megatron_eve.models.eve2.parameters import PARTS, parameter_counts
from megatron_eve.models.eve2.templates import EVE2_PLAIN, EVE2_QWEN2, TEXT_RULES
from megatron_eve.models.family import (
    EXPERT_PARAMETERS,
    FRONT_END,
    ImagePlanner,
    ModelFamily,
    PartCounts,
    Preset,
    Stage,
    ViewUse,
)
from megatron_eve.models.golden_format import GoldenFormat
from megatron_eve.models.hf_format import HFFormat
from megatron_eve.models.image_flags import ImageFlag, ImageSetting, ImageSettings
from megatron_eve.models.model_parts import FamilyFlops, FamilyObjective, FrontEnd, Work

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class EVE2Family(ModelFamily):
    """See `ModelFamily`.

    The stages are those of section 3.3 of the paper and of the released scripts; rates, batch sizes and sizes of
    pictures (800 in 1.0, 1600 in 1.1) are settings of the recipes in `examples/`.
    """

    name = "eve2"
    Config: type[Any] = EVE2Config
    presets: Mapping[str, Preset] = PRESETS
    other_names: Mapping[str, str] = OTHER_NAMES
    stages: Mapping[int, Stage] = {
        0: Stage("patch embedding alone", PARTS[FRONT_END], template=EVE2_PLAIN.name),
        1: Stage(
            "patch embedding and experts", (*PARTS[FRONT_END], EXPERT_PARAMETERS), template=EVE2_PLAIN.name
        ),
        2: Stage("full alignment", ("*",), template=EVE2_QWEN2.name),
        3: Stage("supervised fine-tuning", ("*",), template=EVE2_QWEN2.name),
    }
    parts: Mapping[str, tuple[str, ...]] = PARTS
    image_flags: Mapping[str, ImageFlag] = IMAGE_FLAGS
    text_rules = TEXT_RULES

    def check_sizes(self, config: RunConfig) -> Iterator[str]:
        """See `ModelFamily.check_sizes`."""
        return check_sizes(config.vision)

    def check(self, config: RunConfig) -> Iterator[str]:
        """See `ModelFamily.check`."""
        return check_stage(config)

    # --- configuration ---

    def inference_settings(self, vision: EVE2Config) -> EVE2Config:
        """See `ModelFamily.inference_settings`: pictures get their size by the published rule of evaluation."""
        return replace(vision, image_resize="scale")

    def parameter_counts(self, config: RunConfig) -> PartCounts:
        """See `ModelFamily.parameter_counts`."""
        return parameter_counts(config.model, config.vision)

    def check_weights(self, saved: dict[str, Any], config: RunConfig) -> Iterator[str]:
        """See `ModelFamily.check_weights`."""
        return check_weights(saved, config)

    # --- model ---

    def front_end(self, config: RunConfig, transformer: TransformerConfig) -> FrontEnd:
        """See `ModelFamily.front_end`: the patch embedding layer."""
        from megatron_eve.models.eve2.front_end import EVE2FrontEnd

        return EVE2FrontEnd(transformer, config.vision)

    def objectives(self, config: RunConfig) -> tuple[FamilyObjective, ...]:
        """See `ModelFamily.objectives`: the next token is the only one."""
        return ()

    def flops(self, config: RunConfig, work: Work) -> FamilyFlops:
        """See `ModelFamily.flops`."""
        return eve2_flops(config, work)

    # --- data ---

    def image_settings(self, config: RunConfig) -> dict[str, ImageSetting]:
        """See `ModelFamily.image_settings`."""
        return image_settings(config.vision)

    def check_image_settings(self, settings: ImageSettings) -> Iterator[str]:
        """See `ModelFamily.check_image_settings`."""
        return image_setting_errors(settings)

    def image_planner(self, settings: ImageSettings) -> ImagePlanner:
        """See `ModelFamily.image_planner`, and `geometry`."""
        return planner(settings)

    def views(self, config: RunConfig) -> Mapping[str, ViewUse]:
        """See `ModelFamily.views`: patches, decoded on the first stage."""
        return {"patches": ViewUse("first", shared=False)}

    # --- Hugging Face ---

    def hugging_face(self) -> HFFormat:
        """See `ModelFamily.hugging_face`."""
        from megatron_eve.models.eve2.hf.format import EVE2Format

        return EVE2Format()

    # --- verification ---

    def golden(self) -> GoldenFormat:
        """See `ModelFamily.golden`."""
        from megatron_eve.models.eve2.golden import EVE2Golden

        return EVE2Golden()


FAMILY: ModelFamily = EVE2Family()
