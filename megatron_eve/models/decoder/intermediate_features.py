"""Intermediate features: image rows at some depths of the decoder, projected there and sent to the last stage.

An objective on the last pipeline stage may want several depths, so every earlier depth has to reach that stage. A
layer of such a depth projects its own image rows (D -> K values each) and passes them on: to the next layer beside
the hidden states, as megatron-core's `context` (which a decoder-only layer passes through unread), and to the next
stage as further rows of the one tensor that stages exchange::

    [ hidden states: n rows of D | features so far: J * R * K values, as ceil(J * R * K / D) rows of D ]

Nothing in megatron-core's schedules changes. Projection inside the layer's own forward is what makes it right
under recomputation: a forward hook would run on detached tensors and lose its gradient without a word.

Shapes: n = rows of hidden states on this rank, D = decoder width, K = feature width, R = rows on this rank that become
features, J = depths so far, c = visual tokens on this rank, r = pooling.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import reduce_scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.nn import functional

# Of the LayerNorm before each projection, as published.
_EPSILON = 1e-5


@dataclass
class FeatureRows:
    """Which rows of this rank's hidden states become intermediate features, and how.

    Without pooling a rank takes the visual tokens among its own rows. With pooling a feature
    covers r x r tokens, which may lie on several ranks: all ranks that share the pack sum what they hold of every
    patch, and each gets an equal share of the sums.

    Attributes:
        hidden_rows: n.
        rows: int64 [c], rows of the hidden states that hold visual tokens (patches; no CLS, no row end).
        count: R; without pooling c.
        pooling: r.
        slots: int64 [c], place of each token among r * r * shares * R slots, patch after patch (pooling only).
        group: ranks over which the rows of the pack are spread (pooling only; None: all are here).
        stream_rows: rows of the stream that leaves the model chunk, where shapes are fixed; None: what it takes.
    """

    hidden_rows: int
    rows: torch.Tensor
    count: int
    pooling: int = 1
    slots: torch.Tensor | None = None
    group: torch.distributed.ProcessGroup | None = None
    stream_rows: int | None = None

    def take(self, hidden: torch.Tensor) -> torch.Tensor:
        """The chosen rows of hidden states [n, 1, D]: [R, D], averaged over r x r tokens with pooling.

        With pooling this is a collective of `group`, unless the pack holds no image.
        """
        tokens = hidden[:, 0].index_select(0, self.rows)  # (c, D)
        if self.slots is None or not self.count:
            return tokens
        shares = self.group.size() if self.group is not None else 1
        pooled = self.pooling**2
        # Each token has a slot of its own, so sums have a fixed order (an index_add on a GPU would not).
        slots = tokens.new_zeros(shares * self.count * pooled, tokens.shape[1])
        sums = slots.index_copy(0, self.slots, tokens).unflatten(0, (-1, pooled)).sum(1) / pooled
        if self.group is None:
            return sums
        return reduce_scatter_to_sequence_parallel_region(sums, group=self.group)


class FeatureProjection(torch.nn.Module):
    """LayerNorm and projection of one depth (`vision_tower_compressor.norm_layer.*` of the published model)."""

    def __init__(self, config: TransformerConfig, width: int) -> None:
        """`width` is K."""
        super().__init__()
        self.norm = torch.nn.LayerNorm(config.hidden_size, eps=_EPSILON)
        self.projection = torch.nn.Linear(config.hidden_size, width, bias=False)
        self.to(config.params_dtype)
        mark_sequence_parallel(self, config)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, D] -> [R, K]."""
        return self.projection(self.norm(rows))


def mark_sequence_parallel(module: torch.nn.Module, config: TransformerConfig) -> None:
    """Have megatron-core sum the gradients of replicated weights that each saw a shard of the tokens only.

    Without the mark they come out 1 / TP short, and nothing says so.
    """
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class FeatureLayer(TransformerLayer):
    """megatron-core's layer that projects its output where an objective wants its depth.

    Args:
        feature_depths: depths that become features; this layer's output has depth `layer_number`.
        feature_width: K.
        closes_chunk: True for the last layer of a model chunk, which makes one stream of hidden states and features.
    """

    def __init__(
        self,
        *args: Any,
        feature_depths: Collection[int],
        feature_width: int,
        closes_chunk: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.closes_chunk = closes_chunk
        self.tap = (
            FeatureProjection(self.config, feature_width) if self.layer_number in feature_depths else None
        )

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor, packed_seq_params: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One layer.

        Args:
            hidden_states: [n, 1, D].
            context: [J, R, K], features so far.
            packed_seq_params: `PackedParams` with `feature_rows`.

        Returns:
            Hidden states and features; from the last layer of a chunk their stream [n + rows of features, 1, D]
            and None.
        """
        hidden_states, _ = super().forward(
            hidden_states=hidden_states, packed_seq_params=packed_seq_params, **kwargs
        )
        if self.tap is not None:
            context = torch.cat([context, self.tap(packed_seq_params.feature_rows.take(hidden_states))[None]])
        if self.closes_chunk:
            return join_stream(hidden_states, context, packed_seq_params.feature_rows.stream_rows), None
        return hidden_states, context


def join_stream(hidden: torch.Tensor, features: torch.Tensor, rows: int | None = None) -> torch.Tensor:
    """Hidden states [n, 1, D] and features [J, R, K] as one tensor [rows, 1, D].

    Without `rows` there are n + ceil(J * R * K / D). What is left of the rows is zero.
    """
    width = hidden.shape[-1]
    flat = features.flatten()
    rest = -len(flat) % width if rows is None else (rows - len(hidden)) * width - len(flat)
    return torch.cat([hidden, functional.pad(flat, (0, rest)).view(-1, 1, width)])


def stream_rows(hidden_rows: int, depths: int, feature_width: int, width: int, pooling: int) -> int:
    """Rows of a stream whatever the pack holds: room for features of all its rows, as if all were visual tokens.

    Args:
        hidden_rows: n.
        depths: J.
        feature_width, width: K and D.
        pooling: r.
    """
    most = -(-hidden_rows // pooling**2)
    return hidden_rows + -(-depths * most * feature_width // width)


def split_stream(
    stream: torch.Tensor, rows: FeatureRows, depths: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reverse of `join_stream`: hidden states [n, 1, D] and features [J, R, K], as views.

    Args:
        stream: from the chunk before.
        rows: of this pack.
        depths: J, depths of features up to here.
        width: K.
    """
    hidden, rest = stream[: rows.hidden_rows], stream[rows.hidden_rows :]
    return hidden, rest.flatten()[: depths * rows.count * width].view(depths, rows.count, width)


def features_before(depth: int, feature_depths: Collection[int]) -> int:
    """How many depths of features lie before the layer whose output has this depth; the input has depth 0."""
    return sum(earlier < depth for earlier in feature_depths)
