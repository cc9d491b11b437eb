"""How tensors of a Hugging Face folder make up one of this model, and how that is spread over tensor-parallel ranks.

`merge` and `split` go between the two; `shard` and `unshard` take tensor parallelism in and out. megatron-core's
packing of q, k, v and of the gated MLP is described at `QKV` and `GatedMLP`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from typing_extensions import override

from megatron_eve.config.schema import ModelConfig


@dataclass(frozen=True)
class Sizes:
    """Sizes a layout needs beside the tensors themselves; `vocab_size` is without padding."""

    num_query_groups: int
    head_dim: int
    padded_vocab_size: int
    vocab_size: int

    @staticmethod
    def of(model: ModelConfig, padded_vocab_size: int) -> Sizes:
        """From a model configuration and the padded vocabulary of this layout."""
        return Sizes(
            model.num_query_groups or model.num_attention_heads,
            model.hidden_size // model.num_attention_heads,
            padded_vocab_size,
            model.vocab_size,
        )


class Layout:
    """One tensor on both sides, equal on every tensor-parallel rank. Base of all others."""

    def merge(self, parts: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        """Hugging Face tensors to our full tensor."""
        (part,) = parts
        return part

    def split(self, full: torch.Tensor, sizes: Sizes, count: int) -> list[torch.Tensor]:
        """Our full tensor to `count` Hugging Face tensors."""
        return [full]

    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """The part of a full tensor that a tensor-parallel rank holds."""
        return full

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The full tensor from the shards of all tensor-parallel ranks, in rank order."""
        return shards[0]


class Replicated(Layout):
    """Norms, the front end's embeddings, biases of row-parallel matrices."""


class Column(Layout):
    """Output rows are spread over ranks."""

    @override
    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        return full.chunk(size, 0)[rank]

    @override
    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(shards), 0)


class Row(Layout):
    """Input columns are spread over ranks."""

    @override
    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        return full.chunk(size, 1)[rank]

    @override
    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(shards), 1)


class Vocabulary(Column):
    """Rows are tokens, padded with zeros to what divides over ranks; export strips the padding.

    Rows that the vocabulary has beyond those of a folder, for tokens that a family adds, begin as the mean of these.

    `split` needs the true size, so the exporter narrows its result to the vocabulary; see `checkpoint/hf/rules.py`.
    """

    @override
    def merge(self, parts: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        (part,) = parts
        if (added := sizes.vocab_size - part.shape[0]) > 0:
            part = torch.cat(
                [part, part.mean(0, keepdim=True, dtype=torch.float32).to(part).expand(added, -1)]
            )
        padding = part.new_zeros(sizes.padded_vocab_size - part.shape[0], *part.shape[1:])
        return torch.cat([part, padding], 0)


class QKV(Column):
    """Query, key and value matrices, or biases, interleaved by key/value group: its queries, its key, its value."""

    @override
    def merge(self, parts: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        grouped = [p.reshape(sizes.num_query_groups, -1, sizes.head_dim, *p.shape[1:]) for p in parts]
        return torch.cat(grouped, 1).reshape(-1, *parts[0].shape[1:])

    @override
    def split(self, full: torch.Tensor, sizes: Sizes, count: int) -> list[torch.Tensor]:
        grouped = full.reshape(sizes.num_query_groups, -1, sizes.head_dim, *full.shape[1:])
        queries = grouped.shape[1] - 2
        return [p.reshape(-1, *full.shape[1:]) for p in grouped.split([queries, 1, 1], 1)]


class GatedMLP(Layout):
    """Gate above up projection; a rank holds its part of both, one above the other."""

    @override
    def merge(self, parts: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        return torch.cat(list(parts), 0)

    @override
    def split(self, full: torch.Tensor, sizes: Sizes, count: int) -> list[torch.Tensor]:
        return list(full.chunk(2, 0))

    @override
    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        return torch.cat([half.chunk(size, 0)[rank] for half in full.chunk(2, 0)], 0)

    @override
    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([torch.cat([s.chunk(2, 0)[i] for s in shards], 0) for i in (0, 1)], 0)
