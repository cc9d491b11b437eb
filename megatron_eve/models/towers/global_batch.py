"""Sums and rows over the data-parallel ranks, with gradients. Plain torch.distributed.

A rank holds a contiguous slice of the global batch, and slices may differ in length. Gradients are those of the sum
over the ranks of what each of them differentiates: a loss that is divided among the ranks has the gradients that one
process would give it once the ranks' gradients of the parameters are summed.

A group of None is this process alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup


def start_and_total(count: int, group: ProcessGroup | None) -> tuple[int, int]:
    """(start, total): where this rank's `count` rows begin among all rows of the global batch, and how many those are.

    Communicates: every rank of the group calls it.
    """
    counts = _counts(count, group)
    return sum(counts[: 0 if group is None else group.rank()]), sum(counts)


def sum_over_ranks(values: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """The sum of the ranks' tensors, the same on all. A gradient is summed likewise.

    Args:
        values: of one shape and dtype on all ranks.
        group: of the ranks.
    """
    return values if group is None else _Sum.apply(values, group)


def gather_rows(rows: torch.Tensor, group: ProcessGroup | None) -> tuple[torch.Tensor, int]:
    """Rows of all ranks in the order of the global batch, and where this rank's begin among them.

    Args:
        rows: [n, ...]; n may differ from rank to rank.
        group: of the ranks.

    Returns:
        [N, ...], the same on all ranks, and the place of this rank's first row. The gradient of a rank's rows is the
        sum of those that all ranks give them.
    """
    return (rows, 0) if group is None else _Gather.apply(rows, group)


def _counts(count: int, group: ProcessGroup | None) -> list[int]:
    """Rows of each rank."""
    if group is None:
        return [count]
    device = torch.device("cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu")
    counts = torch.zeros(group.size(), dtype=torch.int64, device=device)
    counts[group.rank()] = count
    torch.distributed.all_reduce(counts, group=group)
    return [int(one) for one in counts.tolist()]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = values.detach().contiguous().clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: ProcessGroup) -> tuple[torch.Tensor, int]:
        counts = _counts(len(rows), group)
        ctx.group, ctx.count, ctx.start = group, len(rows), sum(counts[: group.rank()])
        # A sum with zeros in the other ranks' places: exact, and slices may differ in length.
        every = rows.new_zeros(sum(counts), *rows.shape[1:])
        every[ctx.start : ctx.start + ctx.count] = rows.detach()
        torch.distributed.all_reduce(every, group=group)
        return every, ctx.start

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: None) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total[ctx.start : ctx.start + ctx.count], None
