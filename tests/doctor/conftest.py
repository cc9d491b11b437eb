"""Modules that are here, broken or another project's, for the length of a test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_eve.doctor.packages import EXTENSION


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that comes first when modules are looked for; what is imported from it is forgotten."""
    ours = ("transformer_engine", "apex", EXTENSION, "flash_attn", "broken_package")

    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]
