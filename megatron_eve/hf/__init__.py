"""EVE for transformers: importing this package registers it, so that no code from a model folder has to run.

    import megatron_eve.hf
    from transformers import AutoModelForCausalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained("eve-7b-hf")
    model = AutoModelForCausalLM.from_pretrained("eve-7b-hf")

The modules beside this one are what an exported folder carries for `trust_remote_code=True`: they import nothing else
of this project.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from megatron_eve.hf.configuration_eve import EVEConfig
from megatron_eve.hf.image_processing_eve import EVEImageProcessor
from megatron_eve.hf.modeling_eve import EVELlamaForCausalLM
from megatron_eve.hf.processing_eve import EVEProcessor

AutoConfig.register(EVEConfig.model_type, EVEConfig, exist_ok=True)
AutoModelForCausalLM.register(EVEConfig, EVELlamaForCausalLM, exist_ok=True)
AutoModelForImageTextToText.register(EVEConfig, EVELlamaForCausalLM, exist_ok=True)
AutoImageProcessor.register(EVEConfig, slow_image_processor_class=EVEImageProcessor, exist_ok=True)
AutoProcessor.register(EVEConfig, EVEProcessor, exist_ok=True)

CONFIGURATIONS = (EVEConfig,)
"""Of every model that is registered here; each has a `model_type`, which a folder's config.json names."""

__all__ = ["CONFIGURATIONS", "EVEConfig", "EVEImageProcessor", "EVELlamaForCausalLM", "EVEProcessor"]
