"""The pool of ranks of the tests: a rank that dies fails its test alone."""

from __future__ import annotations

import os

import pytest

from tests.ranks import RankError, RankPool


def ends() -> None:
    if os.environ["RANK"] == "1":
        os._exit(3)


def number() -> int:
    return int(os.environ["RANK"])


@pytest.mark.distributed
def test_a_rank_that_ends_fails_its_test_and_no_other(ranks: RankPool) -> None:
    with pytest.raises(RankError, match=r"\{1: 3\}"):
        ranks.run(2, ends)
    assert ranks.run(2, number) == [0, 1]
