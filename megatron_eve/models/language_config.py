"""The config.json of a decoder alone, as transformers writes it: of folders that hold a model in parts. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.rope_scaling import scaling_field


def language_config(model: ModelConfig, dtype: str, ids: Mapping[str, int]) -> dict[str, Any]:
    """The fields of transformers' Llama or, with biases of query, key and value, Qwen2.

    Args:
        model: sizes.
        dtype: of the weights, such as "bfloat16".
        ids: of control tokens (`bos_token_id`).
    """
    qwen = model.add_qkv_bias
    return {
        "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"],
        **({} if qwen else {"attention_bias": False}),
        "attention_dropout": 0.0,
        **ids,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "model_type": "qwen2" if qwen else "llama",
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        **({"use_sliding_window": False} if qwen else {"pretraining_tp": 1}),
        "rms_norm_eps": model.norm_epsilon,
        "rope_scaling": scaling_field(model),
        "rope_theta": float(model.rotary_base),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }
