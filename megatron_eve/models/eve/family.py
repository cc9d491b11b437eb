"""EVE as a model family (arXiv 2406.11832): its sizes, checks and stages. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.schema import RunConfig
from megatron_eve.models.eve.checks import (
    check_alignment,
    check_resume,
    check_sizes,
    check_weights,
    missing_parts,
)
from megatron_eve.models.eve.config import OTHER_NAMES, PRESETS, TRAINING_SETTINGS, EVEConfig, upgrade
from megatron_eve.models.eve.flops import eve_flops, teacher_sizes
from megatron_eve.models.eve.geometry import IMAGE_FLAGS, image_setting_errors, planner
from megatron_eve.models.eve.objectives import Aligning
from megatron_eve.models.eve.parameters import ALIGNING_LAYER, PARTS, parameter_counts
from megatron_eve.models.family import (
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


class EVEFamily(ModelFamily):
    """See `ModelFamily`.

    The stages are those of section 3.2 and Table 8 of the paper; rates, batch sizes and templates are settings of the
    recipes in `examples/`.
    """

    name = "eve"
    Config: type[Any] = EVEConfig
    presets: Mapping[str, Preset] = PRESETS
    other_names: Mapping[str, str] = OTHER_NAMES
    stages: Mapping[int, Stage] = {
        # The decoder stays as the language model left it, so that noisy early visual rows cannot break it.
        1: Stage("LLM-guided pre-alignment", (*PARTS[FRONT_END], *PARTS[ALIGNING_LAYER])),
        2: Stage("generative pretraining", ("*",)),
        3: Stage("supervised fine-tuning", ("*",), template="vicuna_v1"),
    }
    parts: Mapping[str, tuple[str, ...]] = PARTS
    image_flags: Mapping[str, ImageFlag] = IMAGE_FLAGS

    def check_sizes(self, config: RunConfig) -> Iterator[str]:
        """See `ModelFamily.check_sizes`."""
        return check_sizes(config.vision)

    def check(self, config: RunConfig) -> Iterator[str]:
        """See `ModelFamily.check`."""
        return check_alignment(config)

    # --- configuration ---

    def upgrade(self, tree: dict[str, Any]) -> dict[str, Any]:
        """See `ModelFamily.upgrade`."""
        return upgrade(tree)

    def inference_settings(self, vision: EVEConfig) -> EVEConfig:
        """See `ModelFamily.inference_settings`: the same model without the aligning layer."""
        return replace(vision, **{name: getattr(EVEConfig, name) for name in TRAINING_SETTINGS})

    def parameter_counts(self, config: RunConfig) -> PartCounts:
        """See `ModelFamily.parameter_counts`."""
        return parameter_counts(config.model, config.vision)

    def fingerprint(self, config: RunConfig) -> dict[str, Any] | None:
        """See `ModelFamily.fingerprint`: the teacher's path and the sha256 of its files."""
        if not config.vision.patch_aligning:
            return None
        from megatron_eve.models.eve.teacher import teacher_fingerprint

        return teacher_fingerprint(config.vision.teacher_model)

    def check_resume(
        self, saved: dict[str, Any], config: RunConfig, frozen: dict[str, Any] | None
    ) -> Iterator[str]:
        """See `ModelFamily.check_resume`."""
        return check_resume(saved, config, frozen)

    def check_weights(self, saved: dict[str, Any], config: RunConfig) -> Iterator[str]:
        """See `ModelFamily.check_weights`: the HD model starts from 672-pixel weights."""
        return check_weights(saved, config)

    def missing_parts(self, saved: dict[str, Any], config: RunConfig) -> Mapping[str, str]:
        """See `ModelFamily.missing_parts`."""
        return missing_parts(saved, config)

    # --- model ---

    def front_end(self, config: RunConfig, transformer: TransformerConfig) -> FrontEnd:
        """See `ModelFamily.front_end`: patch embedding and projector."""
        from megatron_eve.models.eve.front_end import EVEFrontEnd

        return EVEFrontEnd(transformer, config.vision)

    def objectives(self, config: RunConfig) -> tuple[FamilyObjective, ...]:
        """See `ModelFamily.objectives`: the aligning loss, where there is an aligning layer."""
        return (Aligning(config),) if config.vision.patch_aligning else ()

    def flops(self, config: RunConfig, work: Work) -> FamilyFlops:
        """See `ModelFamily.flops`."""
        return eve_flops(config, work, teacher_sizes(config.vision))

    # --- data ---

    def image_settings(self, config: RunConfig) -> dict[str, ImageSetting]:
        """See `ModelFamily.image_settings`: the teacher's patches are those of the tower in its folder."""
        vision: EVEConfig = config.vision
        settings: dict[str, ImageSetting] = {
            "image_size": vision.image_size,
            "teacher_size": vision.teacher_size,
        }
        if vision.patch_aligning and vision.teacher_model is not None:
            with suppress(ConfigError):  # `check` says what is wrong with the folder
                settings["teacher_patch_size"] = vision.tower().patch_size
        return settings

    def check_image_settings(self, settings: ImageSettings) -> Iterator[str]:
        """See `ModelFamily.check_image_settings`."""
        return image_setting_errors(settings)

    def image_planner(self, settings: ImageSettings) -> ImagePlanner:
        """See `ModelFamily.image_planner`, and `geometry`."""
        return planner(settings)

    def views(self, config: RunConfig) -> Mapping[str, ViewUse]:
        """See `ModelFamily.views`: patches for the patch embedding, and square pictures for the teacher."""
        views = {"patches": ViewUse("first", shared=False)}
        if config.vision.patch_aligning:
            views["teacher"] = ViewUse("last", shared=True)
        return views

    # --- Hugging Face ---

    def hugging_face(self) -> HFFormat:
        """See `ModelFamily.hugging_face`."""
        from megatron_eve.models.eve.hf.format import EVEFormat

        return EVEFormat()

    # --- verification ---

    def golden(self) -> GoldenFormat:
        """See `ModelFamily.golden`."""
        from megatron_eve.models.eve.golden import EVEGolden

        return EVEGolden()


FAMILY: ModelFamily = EVEFamily()
