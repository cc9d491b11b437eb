"""Which rows of a pack a context-parallel rank holds.

Under causal attention the last tokens of a sample meet many keys and the first ones few. So each sample (padded to
a multiple of 2 * CP) is cut into 2 * CP chunks, and rank c takes chunks c and 2 * CP - 1 - c: all ranks have the
same number of tokens and of query-key pairs. TransformerEngine cuts packed sequences the same way
(`thd_get_partitioned_indices`), and so does megatron-core's rotary embedding.

Shapes: T = tokens of a pack (padding included), S = samples in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def zigzag_rows(lengths: Sequence[int], size: int, rank: int) -> torch.Tensor:
    """Rows of the pack on one rank, sample after sample, in rising order within each.

    Args:
        lengths: padded tokens of each sample, multiples of 2 * size.
        size, rank: of the context-parallel group.

    Returns:
        int64 [T / size], on the host.

    Raises:
        ValueError: a length that does not divide.
    """
    if any(length % (2 * size) for length in lengths):
        raise ValueError(
            f"context parallel {size} needs samples padded to {2 * size}, got lengths {list(lengths)}"
        )
    chunks = torch.tensor(lengths) // (2 * size)
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    sample = torch.arange(len(lengths)).repeat_interleave(2 * chunks)
    within = torch.arange(len(sample)) - (2 * chunks.cumsum(0) - 2 * chunks)[sample]
    chunk = chunks[sample]
    # The second half of a rank's rows lies in its second chunk.
    moved = torch.where(within < chunk, rank * chunk, (2 * size - 2 - rank) * chunk)
    return starts[sample] + within + moved


def gathered_order(lengths: Sequence[int], size: int) -> torch.Tensor:
    """Where each row of the pack stands in the concatenation of all ranks' rows.

    Returns:
        int64 [T], on the host.
    """
    return torch.cat([zigzag_rows(lengths, size, rank) for rank in range(size)]).argsort()
