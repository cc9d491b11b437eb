"""VILA registered with transformers."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import AutoConfig, AutoModelForImageTextToText

from megatron_eve.models.vila.hf.configuration_vila import VILAConfig
from megatron_eve.models.vila.hf.modeling_vila import VILAForConditionalGeneration


def register() -> Mapping[str, type]:
    """See `HFFormat.register`."""
    AutoConfig.register(VILAConfig.model_type, VILAConfig, exist_ok=True)
    AutoModelForImageTextToText.register(VILAConfig, VILAForConditionalGeneration, exist_ok=True)
    # A folder that transformers saves of them holds their code, as the one that they were loaded from.
    VILAConfig.register_for_auto_class()
    VILAForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    return {some.__name__: some for some in (VILAConfig, VILAForConditionalGeneration)}
