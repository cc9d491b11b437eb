"""Which rows of a pack a rank holds, under context and sequence parallelism; T = tokens of the pack with padding."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from megatron_eve.models.decoder.context_parallel import zigzag_rows
from megatron_eve.models.model_parts import Pack


def context_rows(pack: Pack) -> torch.Tensor | None:
    """int64 [T / cp], rows of the pack on this context-parallel rank; None without context parallelism."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return None
    lengths = pack.cu_seqlens_padded.diff().tolist()
    return zigzag_rows(lengths, size, parallel_state.get_context_parallel_rank())


def rows_on_rank(pack: Pack, sequence_parallel: bool) -> torch.Tensor:
    """int64 [n], rows of the pack in this rank's hidden states, in their order there.

    Args:
        pack: on the host.
        sequence_parallel: the rank holds only its share of the rows.
    """
    mine = context_rows(pack)
    mine = torch.arange(len(pack.tokens)) if mine is None else mine
    if not sequence_parallel:
        return mine
    size = parallel_state.get_tensor_model_parallel_world_size()
    return mine.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]


def pack_group(sequence_parallel: bool) -> torch.distributed.ProcessGroup | None:
    """The ranks over which the rows of one pack are spread, None where each has them all."""
    context_parallel = parallel_state.get_context_parallel_world_size() > 1
    if context_parallel and sequence_parallel:
        return parallel_state.get_tensor_and_context_parallel_group()
    if context_parallel:
        return parallel_state.get_context_parallel_group()
    return parallel_state.get_tensor_model_parallel_group() if sequence_parallel else None
