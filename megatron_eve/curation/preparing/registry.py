"""The preparers by name."""

from __future__ import annotations

from megatron_eve.curation.preparing.ai2d import Ai2d
from megatron_eve.curation.preparing.chartqa import ChartQa
from megatron_eve.curation.preparing.coyo import Coyo
from megatron_eve.curation.preparing.docvqa import DocVqa
from megatron_eve.curation.preparing.dvqa import Dvqa
from megatron_eve.curation.preparing.eve_hd import EveHd
from megatron_eve.curation.preparing.laion import Laion
from megatron_eve.curation.preparing.llava import Bunny, Llava558k, LlavaMix665k, VisionFlan
from megatron_eve.curation.preparing.mmc4 import Mmc4, Mmc4Pairs
from megatron_eve.curation.preparing.open_images import OpenImages
from megatron_eve.curation.preparing.preparer import Preparer
from megatron_eve.curation.preparing.sa1b import Sa1b
from megatron_eve.curation.preparing.synthdog import SynthDog
from megatron_eve.curation.preparing.text import Text

_PREPARERS: tuple[type[Preparer], ...] = (
    Sa1b,
    OpenImages,
    Laion,
    Coyo,
    Mmc4,
    Mmc4Pairs,
    Llava558k,
    LlavaMix665k,
    EveHd,
    Ai2d,
    SynthDog,
    Dvqa,
    ChartQa,
    DocVqa,
    VisionFlan,
    Bunny,
    Text,
)

PREPARERS: dict[str, type[Preparer]] = {one.name: one for one in _PREPARERS}
"""{name on the command line: the preparer}."""
