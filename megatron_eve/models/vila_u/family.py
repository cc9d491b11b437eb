"""VILA-U as a model family (arXiv 2409.04429): its sizes, checks and stages. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_eve.config.schema import RunConfig
from megatron_eve.models.family import (
    CodeSizes,
    ImagePlanner,
    ModelFamily,
    PartCounts,
    Preset,
    Stage,
    ViewUse,
)
from megatron_eve.models.golden_format import GoldenFormat
from megatron_eve.models.hf_format import HFFormat
from megatron_eve.models.image_codes import CodeTower
from megatron_eve.models.image_flags import ImageFlag, ImageSetting, ImageSettings
from megatron_eve.models.model_parts import FamilyFlops, FamilyObjective, FrontEnd, Work
from megatron_eve.models.vila_u.checks import (
    check_parallel,
    check_resume,
    check_sizes,
    check_tower,
    check_weights,
    read_tower,
    tower_fingerprint,
)
from megatron_eve.models.vila_u.config import OTHER_NAMES, PRESETS, TRAINING_SETTINGS, VILAUConfig
from megatron_eve.models.vila_u.geometry import IMAGE_FLAGS, image_setting_errors, image_settings, planner
from megatron_eve.models.vila_u.objectives import VisualLoss
from megatron_eve.models.vila_u.parameters import DEPTH_HEAD, PARTS, PROJECTOR, parameter_counts
from megatron_eve.models.vila_u.templates import TEXT_RULES

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

_TRAINED = (
    *PARTS[PROJECTOR],
    *PARTS[DEPTH_HEAD],
    *("embedding.*", "decoder.*", "final_layernorm.*", "output_layer.*"),
)


class VILAUFamily(ModelFamily):
    """See `ModelFamily`.

    Pictures are read as codes of the dataset, so that no tower runs in training. The codebook is frozen in all stages;
    rates and batch sizes are settings of the recipes.
    """

    name = "vila_u"
    Config: type[Any] = VILAUConfig
    presets: Mapping[str, Preset] = PRESETS
    other_names: Mapping[str, str] = OTHER_NAMES
    stages: Mapping[int, Stage] = {
        2: Stage("unified pretraining", _TRAINED, template="v1_document"),
        3: Stage("supervised fine-tuning", _TRAINED, template="v1"),
    }
    parts: Mapping[str, tuple[str, ...]] = PARTS
    image_flags: Mapping[str, ImageFlag] = IMAGE_FLAGS
    text_rules = TEXT_RULES
    reads_codes = True

    def check_sizes(self, config: RunConfig) -> Iterator[str]:
        """See `ModelFamily.check_sizes`."""
        return check_sizes(config.vision)

    def check(self, config: RunConfig) -> Iterator[str]:
        """See `ModelFamily.check`."""
        yield from check_parallel(config)
        yield from check_tower(config)

    # --- configuration ---

    def inference_settings(self, vision: VILAUConfig) -> VILAUConfig:
        """See `ModelFamily.inference_settings`."""
        return replace(vision, **{name: getattr(VILAUConfig, name) for name in TRAINING_SETTINGS})

    def parameter_counts(self, config: RunConfig) -> PartCounts:
        """See `ModelFamily.parameter_counts`."""
        return parameter_counts(config)

    def fingerprint(self, config: RunConfig) -> dict[str, Any] | None:
        """See `ModelFamily.fingerprint`: the tower that made the codes."""
        return tower_fingerprint(config.vision)

    def check_resume(
        self, saved: dict[str, Any], config: RunConfig, frozen: dict[str, Any] | None
    ) -> Iterator[str]:
        """See `ModelFamily.check_resume`."""
        return check_resume(saved, config, frozen)

    def check_weights(self, saved: dict[str, Any], config: RunConfig) -> Iterator[str]:
        """See `ModelFamily.check_weights`."""
        return check_weights(saved, config)

    # --- model ---

    def front_end(self, config: RunConfig, transformer: TransformerConfig) -> FrontEnd:
        """See `ModelFamily.front_end`: codebook and projector."""
        from megatron_eve.models.vila_u.front_end import CodeFrontEnd

        return CodeFrontEnd(transformer, config.vision)

    def objectives(self, config: RunConfig) -> tuple[FamilyObjective, ...]:
        """See `ModelFamily.objectives`: the codes of pictures that are to be drawn."""
        return (VisualLoss(config),)

    def flops(self, config: RunConfig, work: Work) -> FamilyFlops:
        """See `ModelFamily.flops`."""
        from megatron_eve.models.vila_u.flops import vila_u_flops

        return vila_u_flops(config, work)

    def visual_label_work(self, config: RunConfig) -> float:
        """See `ModelFamily.visual_label_work`."""
        from megatron_eve.models.vila_u.flops import visual_label_work

        return visual_label_work(config)

    def draws_random_numbers(self, config: RunConfig) -> bool:
        """See `ModelFamily.draws_random_numbers`: the dropout of the depth transformer."""
        return bool(config.vision.depth_dropout > 0)

    # --- data ---

    def code_tower(self, config: RunConfig) -> CodeTower | None:
        """See `ModelFamily.code_tower`."""
        return None if config.vision.vision_tokenizer is None else read_tower(config.vision)

    def code_sizes(self, config: RunConfig) -> CodeSizes:
        """See `ModelFamily.code_sizes`."""
        vision: VILAUConfig = config.vision
        grid = vision.code_grid, vision.code_grid
        return CodeSizes(grid, vision.codes_per_position, vision.visual_codebook_size)

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
        """See `ModelFamily.views`: none, since pictures are read as codes."""
        return {}

    # --- Hugging Face ---

    def hugging_face(self) -> HFFormat:
        """See `ModelFamily.hugging_face`."""
        from megatron_eve.models.vila_u.hf.format import VILAUFormat

        return VILAUFormat()

    # --- verification ---

    def golden(self) -> GoldenFormat:
        """See `ModelFamily.golden`."""
        from megatron_eve.models.vila_u.golden import VILAUGolden

        return VILAUGolden()


FAMILY: ModelFamily = VILAUFamily()
