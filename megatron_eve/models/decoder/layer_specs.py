"""Two specifications of one decoder layer: torch ("local") and TransformerEngine.

Both give the same parameter names in a checkpoint: TransformerEngine fuses each norm into the matrix behind it
and names its weight `linear_qkv.layer_norm_weight`; the torch specification keeps megatron-core's
`sharded_state_dict_keys_map`, which stores `input_layernorm.weight` under that name. Both add biases to query, key and
value (`linear_qkv.bias`) where the configuration says `add_qkv_bias`, as Qwen2 has them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_eve.config import LoRAConfig
from megatron_eve.models.decoder.experts import add_experts
from megatron_eve.models.decoder.intermediate_features import FeatureLayer
from megatron_eve.models.decoder.lora import with_adapter
from megatron_eve.models.decoder.torch_layers import PackedAttention, RMSNorm
from megatron_eve.models.model_parts import IntermediateFeatures


def torch_layer_spec() -> ModuleSpec:
    """A Llama decoder layer from torch and megatron-core's own parallel linear layers."""
    spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    return spec


def transformer_engine_layer_spec() -> ModuleSpec:
    """A Llama decoder layer from TransformerEngine: norms fused into linear layers, fused attention on packs.

    Raises:
        RuntimeError: where TransformerEngine is not installed (megatron-core then has mock classes only).
    """
    if not gpt_layer_specs.HAVE_TE:
        raise RuntimeError(
            "--transformer-impl transformer_engine: TransformerEngine does not import here; "
            "`make install-gpu` installs it on GPU machines, --transformer-impl local does without"
        )
    return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()


def add_adapters(layer: ModuleSpec, transformer_engine: bool, lora: LoRAConfig) -> None:
    """Put adapters on the linear layers of a specification, in place.

    TransformerEngine's norms are taken out of the matrices behind them, since an adapter needs the normed input; their
    names in a checkpoint stay.
    """
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = TENorm
        attention.linear_qkv = mlp.linear_fc1 = TEColumnParallelLinear
        layer.submodules.sharded_state_dict_keys_map = (
            torch_layer_spec().submodules.sharded_state_dict_keys_map
        )
    attention.linear_qkv = with_adapter("linear_qkv", attention.linear_qkv, lora)
    attention.linear_proj = with_adapter("linear_proj", attention.linear_proj, lora)
    mlp.linear_fc1 = with_adapter("linear_fc1", mlp.linear_fc1, lora)
    mlp.linear_fc2 = with_adapter("linear_fc2", mlp.linear_fc2, lora)


def final_norm(config: TransformerConfig, transformer_engine: bool) -> Any:
    """The norm after the last layer, which lives outside the block (intermediate features end before it)."""
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
    return RMSNorm(config=config, hidden_size=config.hidden_size)


def last_chunk_layers(config: TransformerConfig) -> int:
    """Decoder layers of the last model chunk of the last pipeline stage, which may be none."""
    layout = config.pipeline_model_parallel_layout
    return config.num_layers if layout is None else layout.layout[-1][-1].count(LayerType.decoder)


def block_spec(
    config: TransformerConfig,
    transformer_engine: bool,
    vp_stage: int | None,
    features: IntermediateFeatures | None = None,
    lora: LoRAConfig | None = None,
    experts: bool = False,
) -> TransformerBlockSubmodules:
    """The layers that this pipeline stage (and model chunk) builds, without a final norm.

    Args:
        features: intermediate features that layers project and send on (see `intermediate_features`);
            None leaves the layers as they are.
        lora: settings of adapters; without a rank there are none.
        experts: a second set of weights for rows of images; goes with neither features nor adapters.
    """
    layer = transformer_engine_layer_spec() if transformer_engine else torch_layer_spec()
    if lora is not None and lora.enabled:
        add_adapters(layer, transformer_engine, lora)
    if experts:
        assert features is None and not (lora is not None and lora.enabled), "config/validate.py refuses it"
        add_experts(layer, torch_layer_spec().submodules.sharded_state_dict_keys_map)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    if features is None:
        return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=None)
    wanted = {"feature_depths": features.depths, "feature_width": features.width}
    layers = [
        replace(layer, module=FeatureLayer, params={**layer.params, **wanted, "closes_chunk": i == count - 1})
        for i in range(count)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=None)
