"""EVE's front end with other objectives, as a module that `--family` names: without features, one without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_eve.config import RunConfig
from megatron_eve.models.eve.family import EVEFamily
from megatron_eve.models.family import ModelFamily, Preset
from megatron_eve.models.model_parts import FamilyObjective, Pack, SampleCounts

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MeanColour:
    """Predict a picture's mean colour from the mean of its rows; one process alone."""

    name: ClassVar[str] = "mean colour"
    module: ClassVar[str | None] = "colour_head"
    weight: ClassVar[float] = 0.5
    adds_over_tensor_parallel: ClassVar[bool] = False
    features: ClassVar[None] = None

    def count(self, counts: SampleCounts) -> int:
        return counts.images

    def head(self, transformer: Any) -> torch.nn.Module:
        from tests.models.decoder.colour_heads import ColourHead

        return ColourHead(transformer.hidden_size)

    def target_model(self) -> None:
        return None

    def rows(self, pack: Pack, sequence_parallel: bool) -> None:
        return None

    def inputs(self, pack: Pack, rows: None, targets: None) -> Any:
        """(rows of each image, float32 [I, 3])."""
        import torch

        counts = (4 * pack.image_grids.prod(dim=1)).tolist()
        colours = [
            part.float().unflatten(1, (3, -1)).mean((0, 2)) / 255
            for part in pack.pixels["patches"].split(counts)
        ]
        spans = list(zip(pack.image_starts.tolist(), pack.image_rows.tolist(), strict=True))
        return spans, torch.stack(colours) if colours else torch.empty(0, 3)


@dataclass(frozen=True)
class Norm(MeanColour):
    """The mean square of hidden states of image rows."""

    name: ClassVar[str] = "norm"
    module: ClassVar[str | None] = None

    def head(self, transformer: Any) -> torch.nn.Module:
        from tests.models.decoder.colour_heads import NormHead

        return NormHead()


class ColourFamily(EVEFamily):
    name = "colour"
    presets: Mapping[str, Preset] = {}

    def objectives(self, config: RunConfig) -> tuple[FamilyObjective, ...]:
        return (MeanColour(), Norm())


FAMILY: ModelFamily = ColourFamily()
