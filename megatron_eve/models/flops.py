"""What a matrix product costs, for counts of model FLOPs (`training/monitoring/flops.py` says what is counted).

A multiply-add is 2 FLOPs. The factors say what a product costs over a step, in units of its forward pass.
"""

from __future__ import annotations

from megatron_eve.config.schema import ModelConfig

TRAINED = 3
"""Forward, gradient of the input and of the weight, or of both inputs of an attention product."""
FROZEN = 2
"""Forward, gradient of the input."""
FROM_PIXELS = 2
"""Forward, gradient of the weight."""
FORWARD = 1


def matrix(inputs: int, outputs: int) -> int:
    """FLOPs of one row times a matrix."""
    return 2 * inputs * outputs


def attention(pairs: int, width: int) -> int:
    """FLOPs of the two products of attention, scores and weighted values: heads together are `width` wide."""
    return 2 * (2 * pairs * width)


def decoder_layer(model: ModelConfig) -> int:
    """FLOPs of one token through the matrices of a decoder layer, forward: query, key, value, output, gated MLP."""
    groups = model.num_query_groups or model.num_attention_heads
    keys = model.hidden_size // model.num_attention_heads * groups
    return (
        2 * matrix(model.hidden_size, model.hidden_size)
        + 2 * matrix(model.hidden_size, keys)
        + 3 * matrix(model.hidden_size, model.ffn_hidden_size)
    )
