"""The toy's objective: every row of a picture predicts the mean colour of the whole picture. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_eve.config.schema import RunConfig
from megatron_eve.models.model_parts import Pack, SampleCounts

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    from tests.families.toy.colour import ColourHead, ColourInputs, ImageRows, MeanColour


@dataclass(frozen=True)
class ColourLoss:
    """Squared distance from the mean colour (0 to 1); see `FamilyObjective`."""

    config: RunConfig
    name: ClassVar[str] = "colour loss"
    module: ClassVar[str] = "colour_head"
    features: ClassVar[None] = None
    adds_over_tensor_parallel: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ()
    gathers_rows: ClassVar[bool] = False

    @property
    def weight(self) -> float:
        """Of this loss in the sum of all."""
        weight: float = self.config.vision.colour_loss_weight
        return weight

    def count(self, counts: SampleCounts) -> int:
        """One for each image."""
        return counts.images

    def head(self, transformer: TransformerConfig) -> ColourHead:
        """The map from hidden states to colours."""
        from tests.families.toy.colour import ColourHead

        return ColourHead(transformer)

    def target_model(self) -> MeanColour:
        """What turns the view "colour" into targets: there is no frozen model in it."""
        from tests.families.toy.colour import MeanColour

        return MeanColour()

    def rows(self, pack: Pack, sequence_parallel: bool) -> ImageRows:
        """Rows of pictures among this rank's hidden states."""
        from tests.families.toy.colour import image_rows

        return image_rows(pack, sequence_parallel)

    def inputs(self, pack: Pack, rows: ImageRows, targets: torch.Tensor | None) -> ColourInputs | None:
        """This rank's rows, each with its picture's colour and one over the picture's rows; None without targets."""
        if targets is None:
            return None
        from tests.families.toy.colour import colour_inputs

        return colour_inputs(pack, rows, targets)
