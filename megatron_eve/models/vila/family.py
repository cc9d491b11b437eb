"""VILA as a model family (arXiv 2312.07533): its sizes, checks and stages. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_eve.config.schema import RunConfig
from megatron_eve.models.family import (
    ImagePlanner,
    ModelFamily,
    PartCounts,
    Preset,
    Stage,
    ViewUse,
)
from megatron_eve.models.golden_format import GoldenFormat
from megatron_eve.models.hf_format import HFFormat
from megatron_eve.models.model_parts import FamilyFlops, FamilyObjective, FrontEnd, Work
from megatron_eve.models.vila.checks import (
    check_parallel,
    check_resume,
    check_sizes,
    check_tower,
    check_weights,
)
from megatron_eve.models.vila.config import OTHER_NAMES, PRESETS, VILAConfig
from megatron_eve.models.vila.geometry import IMAGE_FLAGS, image_setting_errors, image_settings, planner
from megatron_eve.models.vila.templates import TEXT_RULES

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

# What the family adds to a language model.
TOWER, PROJECTOR = "vision tower", "projector"
PARTS = {TOWER: ("vision_model.tower.*",), PROJECTOR: ("vision_model.projector.*",)}
_LANGUAGE_MODEL = ("embedding.*", "decoder.*", "final_layernorm.*", "output_layer.*")


class VILAFamily(ModelFamily):
    """See `ModelFamily`.

    The stages are those of section 4 of the paper, and of the released scripts; rates and batch sizes are settings of
    the recipes in `examples/`. The tower trains only with `--no-freeze-ViT`, as in stage 3 of VILA-1.5.
    """

    name = "vila"
    Config: type[Any] = VILAConfig
    presets: Mapping[str, Preset] = PRESETS
    other_names: Mapping[str, str] = OTHER_NAMES
    stages: Mapping[int, Stage] = {
        1: Stage("projector initialization", PARTS[PROJECTOR]),
        2: Stage("visual language pre-training", (*PARTS[PROJECTOR], *_LANGUAGE_MODEL), template="document"),
        3: Stage("visual instruction tuning", (*PARTS[PROJECTOR], *_LANGUAGE_MODEL), template="vila_v1"),
    }
    parts: Mapping[str, tuple[str, ...]] = PARTS
    image_flags = IMAGE_FLAGS
    text_rules = TEXT_RULES

    def check_sizes(self, config: RunConfig) -> Iterator[str]:
        """See `ModelFamily.check_sizes`."""
        return check_sizes(config.vision)

    def check(self, config: RunConfig) -> Iterator[str]:
        """See `ModelFamily.check`."""
        yield from check_parallel(config)
        yield from check_tower(config.vision)

    def stage(self, config: RunConfig) -> Stage:
        """See `ModelFamily.stage`: without the decoder with `--freeze-LM`, with the tower with `--no-freeze-ViT`."""
        stage, vision = self.stages[config.training.stage], config.vision
        trainable = PARTS[PROJECTOR] if vision.freeze_LM else stage.trainable
        tower = () if vision.freeze_ViT else PARTS[TOWER]
        return replace(stage, trainable=(*trainable, *tower))

    # --- configuration ---

    def inference_settings(self, vision: VILAConfig) -> VILAConfig:
        """See `ModelFamily.inference_settings`."""
        names = ("vision_tower", "freeze_ViT", "freeze_LM", "recompute_vision")
        return replace(vision, **{name: getattr(VILAConfig, name) for name in names})

    def parameter_counts(self, config: RunConfig) -> PartCounts:
        """See `ModelFamily.parameter_counts`."""
        from megatron_eve.models.vila.parameters import parameter_counts

        return parameter_counts(config)

    def check_resume(
        self, saved: dict[str, Any], config: RunConfig, frozen: dict[str, Any] | None
    ) -> Iterator[str]:
        """See `ModelFamily.check_resume`."""
        return check_resume(saved, config)

    def check_weights(self, saved: dict[str, Any], config: RunConfig) -> Iterator[str]:
        """See `ModelFamily.check_weights`."""
        return check_weights(saved, config)

    # --- model ---

    def front_end(self, config: RunConfig, transformer: TransformerConfig) -> FrontEnd:
        """See `ModelFamily.front_end`: vision tower and projector."""
        from megatron_eve.models.vila.front_end import TowerFrontEnd

        return TowerFrontEnd(transformer, config.vision)

    def objectives(self, config: RunConfig) -> tuple[FamilyObjective, ...]:
        """See `ModelFamily.objectives`: the next token is the only one."""
        return ()

    def flops(self, config: RunConfig, work: Work) -> FamilyFlops:
        """See `ModelFamily.flops`."""
        from megatron_eve.models.vila.flops import vila_flops

        return vila_flops(config, work)

    def image_work(self, config: RunConfig) -> float:
        """See `ModelFamily.image_work`."""
        from megatron_eve.models.vila.flops import image_work

        return image_work(config, decoder_trains=self.stage(config).decoder_trains)

    # --- data ---

    def image_settings(self, config: RunConfig) -> dict[str, int | str]:
        """See `ModelFamily.image_settings`."""
        return image_settings(config.vision)

    def check_image_settings(self, settings: Mapping[str, int | str]) -> Iterator[str]:
        """See `ModelFamily.check_image_settings`."""
        return image_setting_errors(settings)

    def image_planner(self, settings: Mapping[str, int | str]) -> ImagePlanner:
        """See `ModelFamily.image_planner`, and `geometry`."""
        return planner(settings)

    def views(self, config: RunConfig) -> Mapping[str, ViewUse]:
        """See `ModelFamily.views`: square pictures for the tower, shared out over the ranks of a pack."""
        return {"tower": ViewUse("first", shared=True)}

    # --- Hugging Face ---

    def hugging_face(self) -> HFFormat:
        """See `ModelFamily.hugging_face`."""
        from megatron_eve.models.vila.hf.format import VILAFormat

        return VILAFormat()

    # --- verification ---

    def golden(self) -> GoldenFormat:
        """See `ModelFamily.golden`."""
        from megatron_eve.models.vila.golden import VILAGolden

        return VILAGolden()


FAMILY: ModelFamily = VILAFamily()
