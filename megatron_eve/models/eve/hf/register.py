"""EVE registered with transformers."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from megatron_eve.models.eve.hf.configuration_eve import EVEConfig
from megatron_eve.models.eve.hf.image_processing_eve import EVEImageProcessor
from megatron_eve.models.eve.hf.modeling_eve import EVELlamaForCausalLM, EVEModel
from megatron_eve.models.eve.hf.processing_eve import EVEProcessor


def register() -> Mapping[str, type]:
    """See `HFFormat.register`."""
    AutoConfig.register(EVEConfig.model_type, EVEConfig, exist_ok=True)
    AutoModel.register(EVEConfig, EVEModel, exist_ok=True)
    AutoModelForCausalLM.register(EVEConfig, EVELlamaForCausalLM, exist_ok=True)
    AutoModelForImageTextToText.register(EVEConfig, EVELlamaForCausalLM, exist_ok=True)
    AutoImageProcessor.register(EVEConfig, slow_image_processor_class=EVEImageProcessor, exist_ok=True)
    AutoProcessor.register(EVEConfig, EVEProcessor, exist_ok=True)
    # A folder that transformers saves of them holds their code, as the one that they were loaded from.
    EVEConfig.register_for_auto_class()
    EVEModel.register_for_auto_class("AutoModel")
    EVELlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    EVEImageProcessor.register_for_auto_class("AutoImageProcessor")
    EVEProcessor.register_for_auto_class("AutoProcessor")
    return {some.__name__: some for some in (EVEConfig, EVEImageProcessor, EVELlamaForCausalLM, EVEProcessor)}
