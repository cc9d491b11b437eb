"""Names of the decoder's tensors in Hugging Face folders: transformers' Llama, and Qwen2 with biases of q, k, v."""

from __future__ import annotations

from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.name_rules import EMBEDDING_KEY, HEAD_KEY, Rule
from megatron_eve.models.tensor_layouts import QKV, GatedMLP, Replicated, Row, Vocabulary

_LAYER, _HF_LAYER = "decoder.layers.*", "model.layers.*"

DECODER_RULES: tuple[Rule, ...] = (
    Rule("embedding.word_embeddings.weight", (EMBEDDING_KEY,), Vocabulary()),
    Rule(f"{_LAYER}.input_layernorm.weight", (f"{_HF_LAYER}.input_layernorm.weight",), Replicated()),
    # TransformerEngine's name of the same norm.
    Rule(
        f"{_LAYER}.self_attention.linear_qkv.layer_norm_weight",
        (f"{_HF_LAYER}.input_layernorm.weight",),
        Replicated(),
    ),
    Rule(
        f"{_LAYER}.self_attention.linear_qkv.weight",
        tuple(f"{_HF_LAYER}.self_attn.{p}_proj.weight" for p in "qkv"),
        QKV(),
    ),
    Rule(f"{_LAYER}.self_attention.linear_proj.weight", (f"{_HF_LAYER}.self_attn.o_proj.weight",), Row()),
    Rule(
        f"{_LAYER}.pre_mlp_layernorm.weight", (f"{_HF_LAYER}.post_attention_layernorm.weight",), Replicated()
    ),
    Rule(
        f"{_LAYER}.mlp.linear_fc1.layer_norm_weight",
        (f"{_HF_LAYER}.post_attention_layernorm.weight",),
        Replicated(),
    ),
    Rule(
        f"{_LAYER}.mlp.linear_fc1.weight",
        (f"{_HF_LAYER}.mlp.gate_proj.weight", f"{_HF_LAYER}.mlp.up_proj.weight"),
        GatedMLP(),
    ),
    Rule(f"{_LAYER}.mlp.linear_fc2.weight", (f"{_HF_LAYER}.mlp.down_proj.weight",), Row()),
    Rule("final_layernorm.weight", ("model.norm.weight",), Replicated()),
    Rule("output_layer.weight", (HEAD_KEY,), Vocabulary()),
)

# Of a decoder with `--add-qkv-bias` (Qwen2).
QKV_BIAS_RULE = Rule(
    f"{_LAYER}.self_attention.linear_qkv.bias",
    tuple(f"{_HF_LAYER}.self_attn.{p}_proj.bias" for p in "qkv"),
    QKV(),
)

# Of a decoder with `--modality-experts`, as its second set of weights was published.
_EXPERT_RULES: tuple[Rule, ...] = (
    Rule(
        f"{_LAYER}.input_layernorm.visual_weight",
        (f"{_HF_LAYER}.moe_input_layernorm.weight",),
        Replicated(),
    ),
    Rule(
        f"{_LAYER}.self_attention.linear_qkv.layer_norm_visual_weight",
        (f"{_HF_LAYER}.moe_input_layernorm.weight",),
        Replicated(),
    ),
    Rule(
        f"{_LAYER}.self_attention.linear_qkv.visual_weight",
        tuple(f"{_HF_LAYER}.self_attn.moe_{p}_proj.weight" for p in "qkv"),
        QKV(),
    ),
    Rule(
        f"{_LAYER}.self_attention.linear_proj.visual_weight",
        (f"{_HF_LAYER}.self_attn.moe_o_proj.weight",),
        Row(),
    ),
    Rule(
        f"{_LAYER}.pre_mlp_layernorm.visual_weight",
        (f"{_HF_LAYER}.moe_post_attention_layernorm.weight",),
        Replicated(),
    ),
    Rule(
        f"{_LAYER}.mlp.linear_fc1.layer_norm_visual_weight",
        (f"{_HF_LAYER}.moe_post_attention_layernorm.weight",),
        Replicated(),
    ),
    Rule(
        f"{_LAYER}.mlp.linear_fc1.visual_weight",
        (f"{_HF_LAYER}.moe_mlp.gate_proj.weight", f"{_HF_LAYER}.moe_mlp.up_proj.weight"),
        GatedMLP(),
    ),
    Rule(f"{_LAYER}.mlp.linear_fc2.visual_weight", (f"{_HF_LAYER}.moe_mlp.down_proj.weight",), Row()),
)
_EXPERT_BIAS_RULE = Rule(
    f"{_LAYER}.self_attention.linear_qkv.visual_bias",
    tuple(f"{_HF_LAYER}.self_attn.moe_{p}_proj.bias" for p in "qkv"),
    QKV(),
)

# Keys that nothing is made of, and why: a buffer that transformers 4.31 saved with every layer.
IGNORED_KEYS = {r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "a buffer that is computed"}


def decoder_rules(model: ModelConfig) -> tuple[Rule, ...]:
    """The rules of a decoder: the fixed ones, and those of biases and experts if it has them."""
    experts = _EXPERT_RULES if model.modality_experts else ()
    biases = (QKV_BIAS_RULE, *([_EXPERT_BIAS_RULE] if experts else [])) if model.add_qkv_bias else ()
    return (*DECODER_RULES, *biases, *experts)
