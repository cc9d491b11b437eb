"""The depth transformer: the codes of a position, one after another, from the hidden state that predicts it.

Follows the public code (mit-han-lab/vila-u `rqtransformer`): t_1 = W2 h + b2, t_d = W1 (e(k_1) + .. + e(k_{d-1})) + b1,
plus a position a depth; causal pre-norm blocks over the depths; a norm and one classifier for all depths. Tensor
parallel over heads, inner MLP and classes; all tensor-parallel ranks have the same rows.

Shapes: R = positions, D = depth, E = width, F = width of a codebook vector, K = size of the codebook, H = width of the
decoder, tp = tensor-parallel size.
"""

from __future__ import annotations

import copy

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megatron_eve.models.replicated import replicated
from megatron_eve.models.vila_u.config import VILAUConfig

_EPSILON, _MLP, _DEVIATION = 1e-5, 4, 0.02


class DepthTransformer(MegatronModule):
    """See above (`rqtransformer` of the published models)."""

    def __init__(self, config: TransformerConfig, vision: VILAUConfig) -> None:
        """Random weights, as the public code draws them.

        Args:
            config: the decoder's.
            vision: sizes.
        """
        super().__init__(config=config)
        width, own = vision.depth_hidden_size, _own_config(config)
        self.in_mlp_1 = replicated(_linear(vision.code_vector_size, width), config)
        self.in_mlp_2 = replicated(_linear(config.hidden_size, width), config)
        position = torch.nn.init.normal_(torch.empty(1, vision.codes_per_position, width), std=_DEVIATION)
        self.pos_emb_d = torch.nn.Parameter(position.to(config.params_dtype))
        self.blocks = _Blocks(own, vision)
        self.layer_norm = replicated(torch.nn.LayerNorm(width, eps=_EPSILON), config)
        self.classifier = _column(own, width, vision.visual_codebook_size)
        if not config.use_cpu_initialization:
            self.cuda()

    def forward(self, hidden: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """Logits of the codes of positions, each from the codes before it.

        Args:
            hidden: [R, H], the same on all tensor-parallel ranks.
            sums: [R, D - 1, F], sums of the vectors of the first 1 .. D - 1 codes.

        Returns:
            [R, D, K / tp], this rank's classes.
        """
        first = self.in_mlp_2(hidden)[:, None]  # (R, 1, E)
        others = self.in_mlp_1(sums.to(first.dtype))  # (R, D - 1, E)
        tokens = torch.cat([first, others], dim=1) + self.pos_emb_d  # (R, D, E)
        return self._classes(self.blocks(tokens))

    def step(self, inputs: torch.Tensor, depth: int, cache: DepthCache) -> torch.Tensor:
        """Logits of the codes of one depth, where those of the depths before it went through the same cache.

        Args:
            inputs: hidden states [R, H] at depth 0; after it [R, F], sums of the vectors of the codes so far.
            depth: counted from 0.
            cache: a new one at depth 0.

        Returns:
            [R, K / tp], this rank's classes.
        """
        layer = self.in_mlp_1 if depth else self.in_mlp_2
        token = layer(inputs.to(layer.weight.dtype))[:, None] + self.pos_emb_d[:, depth : depth + 1]
        return self._classes(self.blocks(token, cache))[:, 0]

    def _classes(self, tokens: torch.Tensor) -> torch.Tensor:
        logits, _ = self.classifier(self.layer_norm(tokens))
        return logits  # type: ignore[no-any-return]


class DepthCache:
    """Keys and values of the depths before, of each block: [R, heads / tp, depths, E / heads]."""

    def __init__(self) -> None:
        self._store: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def extend(
        self, block: torch.nn.Module, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append those of one more depth, and return all of them."""
        if block in self._store:
            earlier_key, earlier_value = self._store[block]
            key, value = torch.cat([earlier_key, key], dim=2), torch.cat([earlier_value, value], dim=2)
        self._store[block] = key, value
        return key, value


class _Blocks(MegatronModule):
    """All blocks, by number. Not a ModuleList: megatron-core would save its shards as if they were whole tensors."""

    def __init__(self, config: TransformerConfig, vision: VILAUConfig) -> None:
        super().__init__(config=config)
        for number in range(vision.depth_num_layers):
            block = _Block(
                config, vision.depth_hidden_size, vision.depth_num_attention_heads, vision.depth_dropout
            )
            self.add_module(str(number), block)

    def forward(self, tokens: torch.Tensor, cache: DepthCache | None = None) -> torch.Tensor:
        """[R, D, E] -> [R, D, E]; with a cache, the next depth of each row alone: [R, 1, E] -> [R, 1, E]."""
        for block in self.children():
            tokens = block(tokens, cache)
        return tokens


class _Block(MegatronModule):
    """Causal attention and an MLP, each behind a norm and added to its input."""

    def __init__(self, config: TransformerConfig, width: int, heads: int, dropout: float) -> None:
        super().__init__(config=config)
        self.head_size, self.dropout = width // heads, dropout
        self.ln1 = replicated(torch.nn.LayerNorm(width, eps=_EPSILON), config)
        self.ln2 = replicated(torch.nn.LayerNorm(width, eps=_EPSILON), config)
        self.query, self.key, self.value = (_column(config, width, width) for _ in range(3))
        self.proj = _row(config, width, width)
        self.fc1 = _column(config, width, _MLP * width)
        self.fc2 = _row(config, _MLP * width, width)

    def forward(self, tokens: torch.Tensor, cache: DepthCache | None = None) -> torch.Tensor:
        """See `_Blocks.forward`."""
        tokens = tokens + self._dropped(self._attention(self.ln1(tokens), cache))
        inner, _ = self.fc1(self.ln2(tokens))
        outputs, _ = self.fc2(functional.gelu(inner))
        return tokens + self._dropped(outputs)

    def _attention(self, normed: torch.Tensor, cache: DepthCache | None) -> torch.Tensor:
        query, key, value = (
            part(normed)[0]
            .unflatten(2, (-1, self.head_size))
            .transpose(1, 2)  # (R, heads / tp, D, E / heads)
            for part in (self.query, self.key, self.value)
        )
        if cache is not None:
            key, value = cache.extend(self, key, value)
        # The newest depth sees all of the cache.
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=cache is None)
        outputs, _ = self.proj(mixed.transpose(1, 2).flatten(2))
        return outputs  # type: ignore[no-any-return]

    def _dropped(self, branch: torch.Tensor) -> torch.Tensor:
        # From the default stream, which is the same on all tensor-parallel ranks, as the branch is.
        return functional.dropout(branch, self.dropout, self.training)


def _own_config(config: TransformerConfig) -> TransformerConfig:
    """The decoder's configuration for layers whose rows are whole on every tensor-parallel rank."""
    own = copy.copy(config)
    own.sequence_parallel = False
    own.fp8 = None
    own.init_method = own.output_layer_init_method = _normal
    return own


def _normal(weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.init.normal_(weight, std=_DEVIATION)


def _linear(inputs: int, outputs: int) -> torch.nn.Linear:
    linear = torch.nn.Linear(inputs, outputs)
    _normal(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    return linear


def _column(config: TransformerConfig, inputs: int, outputs: int) -> ColumnParallelLinear:
    return ColumnParallelLinear(
        inputs, outputs, config=config, init_method=_normal, bias=True, gather_output=False
    )


def _row(config: TransformerConfig, inputs: int, outputs: int) -> RowParallelLinear:
    return RowParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=_normal,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
    )
