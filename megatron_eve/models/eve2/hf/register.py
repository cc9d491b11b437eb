"""EVE v2 registered with transformers."""

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

from megatron_eve.models.eve2.hf.configuration_eve2 import EVE2Config
from megatron_eve.models.eve2.hf.image_processing_eve2 import EVE2ImageProcessor
from megatron_eve.models.eve2.hf.modeling_eve2 import EVE2Model, EVEQwen2ForCausalLM
from megatron_eve.models.eve2.hf.processing_eve2 import EVE2Processor


def register() -> Mapping[str, type]:
    """See `HFFormat.register`."""
    AutoConfig.register(EVE2Config.model_type, EVE2Config, exist_ok=True)
    AutoModel.register(EVE2Config, EVE2Model, exist_ok=True)
    AutoModelForCausalLM.register(EVE2Config, EVEQwen2ForCausalLM, exist_ok=True)
    AutoModelForImageTextToText.register(EVE2Config, EVEQwen2ForCausalLM, exist_ok=True)
    AutoImageProcessor.register(EVE2Config, slow_image_processor_class=EVE2ImageProcessor, exist_ok=True)
    AutoProcessor.register(EVE2Config, EVE2Processor, exist_ok=True)
    # A folder that transformers saves of them holds their code, as the one that they were loaded from.
    EVE2Config.register_for_auto_class()
    EVE2Model.register_for_auto_class("AutoModel")
    EVEQwen2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    EVE2ImageProcessor.register_for_auto_class("AutoImageProcessor")
    EVE2Processor.register_for_auto_class("AutoProcessor")
    return {
        some.__name__: some for some in (EVE2Config, EVE2ImageProcessor, EVEQwen2ForCausalLM, EVE2Processor)
    }
