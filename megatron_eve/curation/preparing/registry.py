"""The preparers by name."""

from __future__ import annotations

from megatron_eve.curation.preparing.preparer import Preparer
from megatron_eve.curation.preparing.sa1b import Sa1b

_PREPARERS: tuple[type[Preparer], ...] = (Sa1b,)

PREPARERS: dict[str, type[Preparer]] = {one.name: one for one in _PREPARERS}
"""{name on the command line: the preparer}."""
