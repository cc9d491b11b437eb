"""EVE as a model family (arXiv 2406.11832): its sizes, checks and stages. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.schema import ModelConfig, RunConfig
from megatron_eve.config.tower import tower_sizes
from megatron_eve.models.eve.checks import check_alignment, check_sizes
from megatron_eve.models.eve.geometry import IMAGE_FLAGS, image_size_errors, planner
from megatron_eve.models.eve.objectives import Aligning
from megatron_eve.models.eve.parameters import PARTS
from megatron_eve.models.eve.presets import PRESETS
from megatron_eve.models.family import (
    ALIGNING_LAYER,
    FRONT_END,
    ImagePlanner,
    ModelFamily,
    Objective,
    SizeFlag,
    Stage,
    ViewUse,
)


class EVEFamily:
    """See `ModelFamily`.

    The stages are those of section 3.2 and Table 8 of the paper; rates, batch sizes and templates are settings of the
    recipes in `examples/`.
    """

    name = "eve"
    presets: Mapping[str, ModelConfig] = PRESETS
    stages: Mapping[int, Stage] = {
        # The decoder stays as the language model left it, so that noisy early visual rows cannot break it.
        1: Stage("LLM-guided pre-alignment", (*PARTS[FRONT_END], *PARTS[ALIGNING_LAYER])),
        2: Stage("generative pretraining", ("*",)),
        3: Stage("supervised fine-tuning", ("*",)),
    }
    parts: Mapping[str, tuple[str, ...]] = PARTS
    image_flags: Mapping[str, SizeFlag] = IMAGE_FLAGS

    def check_sizes(self, config: RunConfig) -> Iterator[str]:
        """See `ModelFamily.check_sizes`."""
        return check_sizes(config.model)

    def check(self, config: RunConfig) -> Iterator[str]:
        """See `ModelFamily.check`."""
        return check_alignment(config)

    def objectives(self, config: RunConfig) -> tuple[Objective, ...]:
        """See `ModelFamily.objectives`: the aligning loss, where there is an aligning layer."""
        alignment = config.alignment
        return (Aligning(weight=alignment.align_loss_weight),) if alignment.patch_aligning else ()

    # --- data ---

    def image_sizes(self, config: RunConfig) -> dict[str, int]:
        """See `ModelFamily.image_sizes`: the teacher's patches are those of the tower in its folder."""
        alignment = config.alignment
        sizes = {"image_size": config.model.image_size, "teacher_size": config.model.teacher_size}
        if alignment.patch_aligning and alignment.teacher_model is not None:
            with suppress(ConfigError):  # `check` says what is wrong with the folder
                tower = tower_sizes(alignment.teacher_model, alignment.teacher_trust_remote_code)
                sizes["teacher_patch_size"] = tower.patch_size
        return sizes

    def check_image_sizes(self, sizes: Mapping[str, int]) -> Iterator[str]:
        """See `ModelFamily.check_image_sizes`."""
        return image_size_errors(sizes)

    def image_planner(self, sizes: Mapping[str, int]) -> ImagePlanner:
        """See `ModelFamily.image_planner`, and `geometry`."""
        return planner(sizes)

    def views(self, config: RunConfig) -> Mapping[str, ViewUse]:
        """See `ModelFamily.views`: patches for the patch embedding, and square pictures for the teacher."""
        views = {"patches": ViewUse("first", shared=False)}
        if config.alignment.patch_aligning:
            views["teacher"] = ViewUse("last", shared=True)
        return views


FAMILY: ModelFamily = EVEFamily()
