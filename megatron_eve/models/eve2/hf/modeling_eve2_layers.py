"""A decoder layer of EVE v2: Qwen2's with two sets of weights, one for rows of images and one for all other rows.

Norms, matrices and biases exist twice, and each row goes through one set; attention is over all rows together. The
second set has the published names, which begin with `moe_`.

Shapes: B = samples, L = tokens with every image row counted, D = decoder width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2MLP,
    Qwen2RMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .configuration_eve2 import EVE2Config


class Rows(NamedTuple):
    """Which rows of a batch take which set of weights: places in the flattened batch, int64, each row in one of them.

    Attributes:
        text: tokens of text, and padding.
        visual: rows of images, class and split rows among them.
    """

    text: Tensor
    visual: Tensor


def by_set(
    hidden: Tensor, rows: Rows | None, text: Callable[[Tensor], Tensor], visual: Callable[[Tensor], Tensor]
) -> Tensor:
    """[B, L, n] -> [B, L, m]: rows of images through `visual`, all others through `text`; None: all are text."""
    if rows is None:
        return text(hidden)
    flat = hidden.flatten(0, 1)
    of_text, of_images = text(flat[rows.text]), visual(flat[rows.visual])
    out = of_text.new_empty(len(flat), of_text.shape[-1])
    out = out.index_copy(0, rows.text, of_text).index_copy(0, rows.visual, of_images)
    return out.unflatten(0, hidden.shape[:2])


class EVE2Attention(Qwen2Attention):
    """Qwen2's attention over all rows together, with a second set of its four matrices."""

    def __init__(self, config: EVE2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width, heads = config.hidden_size, config.num_attention_heads * self.head_dim
        groups = self.k_proj.out_features
        self.moe_q_proj = nn.Linear(width, heads)
        self.moe_k_proj = nn.Linear(width, groups)
        self.moe_v_proj = nn.Linear(width, groups)
        self.moe_o_proj = nn.Linear(heads, width, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        rows: Rows | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As Qwen2's; hidden_states [B, L, D]."""
        query, key, value = (
            by_set(hidden_states, rows, text, visual).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for text, visual in (
                (self.q_proj, self.moe_q_proj),
                (self.k_proj, self.moe_k_proj),
                (self.v_proj, self.moe_v_proj),
            )
        )  # (B, heads, L, head_dim) each, keys and values with fewer heads
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            # Static caches of transformers 4 write at these positions.
            places = {"cache_position": kwargs.get("cache_position")}
            key, value = past_key_values.update(key, value, self.layer_idx, places)
        attend: Any = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.attention_dropout if self.training else 0.0
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return by_set(attended.flatten(2), rows, self.o_proj, self.moe_o_proj), weights


class EVE2DecoderLayer(Qwen2DecoderLayer):
    """A layer of Qwen2 with a second set of weights, for rows of images."""

    def __init__(self, config: EVE2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = EVE2Attention(config, layer_idx)
        self.moe_mlp = Qwen2MLP(config)
        self.moe_input_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.moe_post_attention_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(  # type: ignore[override] # transformers gives all but the first argument by name
        self, hidden_states: Tensor, *, rows: Rows | None = None, **kwargs: Any
    ) -> Tensor:
        """As Qwen2's; hidden_states [B, L, D]."""
        normed = by_set(hidden_states, rows, self.input_layernorm, self.moe_input_layernorm)
        hidden_states = hidden_states + self.self_attn(normed, rows=rows, **kwargs)[0]
        normed = by_set(hidden_states, rows, self.post_attention_layernorm, self.moe_post_attention_layernorm)
        return hidden_states + by_set(normed, rows, self.mlp, self.moe_mlp)
