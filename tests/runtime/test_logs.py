"""What libraries say is told with its rank, and not without end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_eve.runtime.logs import MAX_WARNINGS

TALK = """
import logging, warnings
from megatron_eve.runtime.logs import configure_logging

configure_logging()
logging.getLogger("a.library").info("all is well")
warnings.warn("something is old")
for number in range(500):
    logging.getLogger("a.library").warning("again %d", number)
logging.getLogger("a.library").error("the end")
"""


@pytest.mark.parametrize("rank", [0, 3])
def test_other_ranks_tell_their_warnings_only_and_not_for_ever(rank: int) -> None:
    found = subprocess.run(
        [sys.executable, "-c", TALK],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "RANK": str(rank)},
    )
    lines = found.stderr.splitlines()
    assert found.stdout == ""
    assert any(line.startswith(f"rank {rank} WARNING py.warnings: ") and "is old" in line for line in lines)
    assert lines[-1] == f"rank {rank} ERROR a.library: the end"
    if rank == 0:
        assert "rank 0 INFO a.library: all is well" in lines
    else:
        assert not any("all is well" in line for line in lines)
        shown = [line for line in lines if line.startswith("rank 3 WARNING ")]
        assert len(shown) == MAX_WARNINGS
        assert shown[-1].endswith("(this rank's further warnings are not shown)")
