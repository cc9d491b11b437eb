"""Which rows of a pack the two sets of weights of a decoder with experts (`experts.py`) work on.

Shapes: n = rows of a context-parallel rank, t = those of text among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class ExpertRows:
    """Which rows of a pack are of text and which of images, on a context-parallel rank.

    Attributes:
        order: int64 [n], the rows in the order of the decoder: those of text, then those of images.
        place: int64 [n], where each row of the pack's order stands in that.
        text: t.
        text_of_share: rows of text among those that this rank holds under sequence parallelism; t without it.
    """

    order: torch.Tensor
    place: torch.Tensor
    text: int
    text_of_share: int


def rows_of_text(count: int, device: torch.device) -> ExpertRows:
    """Of a pack without images, on a device."""
    order = torch.arange(count, device=device)
    return ExpertRows(order, order, count, count)


def expert_rows(is_visual: torch.Tensor, rank: int = 0, ranks: int = 1) -> ExpertRows:
    """Sort the rows of a pack, on the host.

    Args:
        is_visual: bool [n], of this context-parallel rank. Rows of padding are text, as published.
        rank, ranks: of sequence parallelism, whose ranks have equal shares of the sorted rows.
    """
    order = torch.argsort(is_visual.to(torch.uint8), stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    text, share = int((~is_visual).sum()), len(order) // ranks
    return ExpertRows(order, place, text, min(max(text - rank * share, 0), share))
