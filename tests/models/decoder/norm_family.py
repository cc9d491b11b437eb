"""The toy with a second objective, which has no weights, no rows of its own and no targets; or without any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_eve.config import RunConfig
from megatron_eve.models.family import ModelFamily
from megatron_eve.models.model_parts import FamilyObjective, Pack, SampleCounts
from tests.families.toy.family import ToyFamily
from tests.families.toy.objective import ColourLoss

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Norm:
    """The mean square of hidden states of image rows; one process alone."""

    name: ClassVar[str] = "norm"
    module: ClassVar[None] = None
    weight: ClassVar[float] = 0.5
    columns: ClassVar[tuple[str, ...]] = ()
    adds_over_tensor_parallel: ClassVar[bool] = False
    features: ClassVar[None] = None
    gathers_rows: ClassVar[bool] = False

    def count(self, counts: SampleCounts) -> int:
        return counts.images

    def head(self, transformer: Any) -> torch.nn.Module:
        import torch

        class NormHead(torch.nn.Module):
            def forward(self, hidden: torch.Tensor, features: None, rows: None, spans: Any) -> torch.Tensor:
                assert features is None and rows is None
                means = [hidden[start : start + count].square().mean() for start, count in spans]
                return torch.stack(means or [hidden.new_zeros(())])

        return NormHead()

    def target_model(self) -> None:
        return None

    def rows(self, pack: Pack, sequence_parallel: bool) -> None:
        return None

    def inputs(self, pack: Pack, rows: None, targets: None) -> list[tuple[int, int]]:
        """First row and number of rows of each image."""
        return list(zip(pack.image_starts.tolist(), pack.image_rows.tolist(), strict=True))


class NormFamily(ToyFamily):
    name = "tests.models.decoder.norm_family"

    def objectives(self, config: RunConfig) -> tuple[FamilyObjective, ...]:
        """Both, or none where the colour loss weighs nothing."""
        return (ColourLoss(config), Norm()) if config.vision.colour_loss_weight else ()


FAMILY: ModelFamily = NormFamily()
