"""The preparers by name."""

from __future__ import annotations

from megatron_eve.curation.preparing.coyo import Coyo
from megatron_eve.curation.preparing.laion import Laion
from megatron_eve.curation.preparing.mmc4 import Mmc4, Mmc4Pairs
from megatron_eve.curation.preparing.open_images import OpenImages
from megatron_eve.curation.preparing.preparer import Preparer
from megatron_eve.curation.preparing.sa1b import Sa1b

_PREPARERS: tuple[type[Preparer], ...] = (Sa1b, OpenImages, Laion, Coyo, Mmc4, Mmc4Pairs)

PREPARERS: dict[str, type[Preparer]] = {one.name: one for one in _PREPARERS}
"""{name on the command line: the preparer}."""
