"""Decoder layers in plain torch, for machines without TransformerEngine and as its numerical reference.

Shapes: T = tokens of a pack, H = query heads on this rank, G = key/value heads on this rank, d = head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megatron_eve.models.decoder.packed import PackedParams


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm as Llama computes it: statistics in float32 (or better), the weight applied last.

    megatron-core's own wrapper of torch norms refuses sequence parallelism; here the weight carries the mark
    `sequence_parallel` by which megatron-core sums its gradient over the ranks that each saw a shard of tokens.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = config.layernorm_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of [..., D]; returns the input's dtype."""
        return self.weight * self.normalise(x)

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """The same without the weight."""
        wide = x if x.dtype == torch.float64 else x.float()
        return functional.rms_norm(wide, (x.shape[-1],), eps=self.eps).to(x.dtype)


class PackedAttention(torch.nn.Module):
    """Causal attention inside each sample of a pack by torch's SDPA, with no [T, T] mask.

    A sample's padding stands at its end, where causal attention of real tokens cannot see it. Under context
    parallelism the ranks gather each other's keys and values; the gradient goes back by a reduce-scatter.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert pg_collection is not None, "megatron-core hands its process groups to every attention"
        self.layer_number = layer_number
        self.context_group = pg_collection.cp
        self.softmax_scale = softmax_scale
        self.grouped = config.num_query_groups != config.num_attention_heads

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedParams | None = None,
    ) -> torch.Tensor:
        """Attend within samples.

        Args:
            query: [T, H, d]; key, value: [T, G, d], rotated already; under context parallelism this rank's rows.
            packed_seq_params: lengths of the samples, and the cache when generating.

        Returns:
            [T, H * d].
        """
        assert packed_seq_params is not None, "the decoder takes packed sequences only"
        lengths, cache = packed_seq_params.lengths, packed_seq_params.cache
        if packed_seq_params.gathered_order is not None:
            key, value = (self._gather(x, packed_seq_params.gathered_order) for x in (key, value))
            return self._zigzag(query, key, value, lengths).flatten(1)
        outputs = []
        pieces = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        for i, (q, k, v) in enumerate(pieces):
            if cache is not None:
                k, v = cache.extend(self.layer_number, packed_seq_params.samples[i], k, v)
            outputs.append(self._attend(q, k, v))
        return torch.cat(outputs).flatten(1)  # (T, H * d)

    def _gather(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """[T / cp, ...] of each context-parallel rank to [T, ...] in the order of the pack."""
        return gather_from_sequence_parallel_region(x, group=self.context_group)[order]

    def _zigzag(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        """This rank's two chunks of each sample, each against the keys up to its own end."""
        size, rank = self.context_group.size(), self.context_group.rank()
        outputs = []
        queries = query.split([length // size for length in lengths])
        for q, k, v in zip(queries, key.split(lengths), value.split(lengths), strict=True):
            width = len(k) // (2 * size)
            for part, chunk in zip(q.split(width), (rank, 2 * size - 1 - rank), strict=True):
                end = (chunk + 1) * width
                mask = torch.ones(width, end, dtype=torch.bool, device=q.device).tril(end - width)
                outputs.append(self._attend(part, k[:end], v[:end], mask))
        return torch.cat(outputs)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        # A step of a generation has one new token, which may see all keys; otherwise keys and queries coincide.
        causal = mask is None and q.shape[0] == k.shape[0]
        assert causal or mask is not None or q.shape[0] == 1, "a cached step takes one token at a time"
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],  # (1, H, Tq, d)
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=self.grouped,
        )
        return out[0].transpose(0, 1)  # (Tq, H, d)
