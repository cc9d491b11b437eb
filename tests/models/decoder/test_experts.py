"""Experts by rows against the published way: both sets of weights on all rows, blended by a mask."""

from __future__ import annotations

import pytest
import torch

from megatron_eve.models.decoder.expert_rows import expert_rows


def test_rows_are_sorted_text_first_and_find_their_way_back() -> None:
    is_visual = torch.tensor([False, True, True, False, True, False])
    rows = expert_rows(is_visual)
    assert rows.order.tolist() == [0, 3, 5, 1, 2, 4]
    assert rows.place.tolist() == [0, 3, 4, 1, 5, 2]
    assert (rows.text, rows.text_of_share) == (3, 3)
    values = torch.arange(6)
    assert values[rows.order][rows.place].equal(values)


@pytest.mark.parametrize(
    ("visual", "shares"), [(0, [3, 3]), (6, [0, 0]), (1, [3, 2]), (3, [3, 0]), (5, [1, 0])]
)
def test_rows_of_text_in_each_share(visual: int, shares: list[int]) -> None:
    is_visual = torch.arange(6) >= 6 - visual
    assert [expert_rows(is_visual, rank, 2).text_of_share for rank in range(2)] == shares
