"""EVE as a model family (arXiv 2406.11832): its sizes, checks and stages. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron_eve.config.schema import RunConfig
from megatron_eve.models.eve.checkpoints import check_resume, check_weights, missing_parts
from megatron_eve.models.eve.checks import check_alignment, check_sizes
from megatron_eve.models.eve.config import OTHER_NAMES, EVEConfig, upgrade
from megatron_eve.models.eve.objectives import Aligning
from megatron_eve.models.eve.parameters import PARTS
from megatron_eve.models.eve.presets import PRESETS
from megatron_eve.models.eve.sizes import parameter_counts
from megatron_eve.models.family import (
    ALIGNING_LAYER,
    FRONT_END,
    ModelFamily,
    Objective,
    PartCounts,
    Preset,
    Stage,
)
from megatron_eve.models.hf_format import HFFormat


class EVEFamily:
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
        return replace(vision, patch_aligning=False, teacher_model=None)

    def stored_patch_size(self, vision: EVEConfig) -> int | None:
        """Side in pixels of the teacher's patches, which stored pixels must fit; None without a teacher."""
        if not vision.patch_aligning or vision.teacher_model is None:
            return None
        return vision.tower().patch_size

    def parameter_counts(self, config: RunConfig) -> PartCounts:
        """See `ModelFamily.parameter_counts`."""
        return parameter_counts(config.model, config.vision)

    def fingerprint(self, config: RunConfig) -> dict[str, Any] | None:
        """See `ModelFamily.fingerprint`: the teacher's path and the sha256 of its files."""
        if not config.vision.patch_aligning:
            return None
        from megatron_eve.models.eve.teacher import teacher_identity

        return teacher_identity(config.vision.teacher_model)

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

    def objectives(self, config: RunConfig) -> tuple[Objective, ...]:
        """See `ModelFamily.objectives`: the aligning loss, where there is an aligning layer."""
        vision: EVEConfig = config.vision
        return (Aligning(weight=vision.align_loss_weight),) if vision.patch_aligning else ()

    # --- Hugging Face ---

    def hugging_face(self) -> HFFormat:
        """See `ModelFamily.hugging_face`."""
        from megatron_eve.models.eve.hf.format import EVEFormat

        return EVEFormat()


FAMILY: ModelFamily = EVEFamily()
