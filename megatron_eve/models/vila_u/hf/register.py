"""VILA-U and its tower registered with transformers."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from megatron_eve.models.vila_u.hf.configuration_vila_u import VILAUConfig
from megatron_eve.models.vila_u.hf.configuration_vila_u_tower import VILAUTowerConfig
from megatron_eve.models.vila_u.hf.image_processing_vila_u import VILAUImageProcessor
from megatron_eve.models.vila_u.hf.modeling_vila_u import VILAUForConditionalGeneration
from megatron_eve.models.vila_u.hf.modeling_vila_u_tower import VILAUTowerModel
from megatron_eve.models.vila_u.hf.processing_vila_u import VILAUProcessor


def register() -> Mapping[str, type]:
    """See `TowerFolders.register`."""
    AutoConfig.register(VILAUTowerConfig.model_type, VILAUTowerConfig, exist_ok=True)
    AutoModel.register(VILAUTowerConfig, VILAUTowerModel, exist_ok=True)
    AutoImageProcessor.register(
        VILAUTowerConfig, slow_image_processor_class=VILAUImageProcessor, exist_ok=True
    )
    # A folder that transformers saves of them holds their code, as the one that they were loaded from.
    VILAUTowerConfig.register_for_auto_class()
    VILAUTowerModel.register_for_auto_class("AutoModel")
    VILAUImageProcessor.register_for_auto_class("AutoImageProcessor")
    return {some.__name__: some for some in (VILAUTowerConfig, VILAUTowerModel, VILAUImageProcessor)}


def register_models() -> Mapping[str, type]:
    """See `HFFormat.register`."""
    AutoConfig.register(VILAUConfig.model_type, VILAUConfig, exist_ok=True)
    AutoModelForImageTextToText.register(VILAUConfig, VILAUForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(VILAUConfig, slow_image_processor_class=VILAUImageProcessor, exist_ok=True)
    AutoProcessor.register(VILAUConfig, VILAUProcessor, exist_ok=True)
    VILAUConfig.register_for_auto_class()
    VILAUForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    VILAUProcessor.register_for_auto_class("AutoProcessor")
    return {some.__name__: some for some in (VILAUConfig, VILAUForConditionalGeneration, VILAUProcessor)}
