"""Fixtures of the whole suite."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

from megatron_eve.models import registry
from tests.ranks import RankPool

# Tests say what is right; a loaded machine may take any time for it.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# A shell without job control starts what stands in the background with SIGINT ignored, and so would be every command
# that a test starts and stops with Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Gloo ranks that live as long as the test session."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="module", autouse=True)
def families_of_one_file() -> Iterator[None]:
    """Families that a file of tests names by their modules are known to it alone."""
    yield
    registry._NAMED.clear()
    registry.find_family.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def no_process_group_left() -> Iterator[None]:
    """A command that ends by an error inside this process leaves its process group; the next file makes its own."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    distributed.destroy_process_group()
