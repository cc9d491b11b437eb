"""What a family says of its golden cases (`verification/`): the typed interface; imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from megatron_eve.models.model_parts import VisualInputs


class GoldenFormat(Protocol):
    """Golden cases of a family: outputs of its published model, by the names that the cases give them.

    The defaults are those of a family whose cases hold nothing beside what a language model computes.

    Attributes:
        sizes: image sizes of the case `preprocess`, by its names of them, as `ModelFamily.image_planner` takes them.
        losses: losses beside `llm_loss`, and the objectives that compute them.
        gradients: of those losses, the prefix of their own part of a gradient.
        heads: by objective, the outputs that hold predictions and targets of its head.
    """

    sizes: Mapping[str, Mapping[str, int]] = {}
    losses: Mapping[str, str] = {}
    gradients: Mapping[str, str] = {}
    heads: Mapping[str, tuple[str, str]] = {}

    def settings(self, meta: Mapping[str, Any], folder: Path, outputs: Collection[str]) -> dict[str, Any]:
        """Settings of the family for a run of a case, as far as config.json does not hold them.

        Args:
            meta: the case's meta.json.
            folder: of the weights.
            outputs: names of the case's outputs; what none of them needs is left out of the run.
        """
        return {}

    def pictures(self, plan: Any, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
        """The pictures that entered the published model, by the case's names, each as a `View` that is not cut.

        Args:
            plan: the `ImagePlan` of a picture.
            sizes: what it was planned for.
        """
        return {}

    def front_end_outputs(
        self, front_end: torch.nn.Module, visual: VisualInputs
    ) -> Mapping[str, Sequence[torch.Tensor]]:
        """Outputs inside the front end, by the case's names: a tensor [rows, width] for each image of a pack."""
        return {}

    def predictions(self, head: torch.nn.Module, given: tuple[Any, ...]) -> torch.Tensor:
        """Predictions [R, width] of an objective's head for what its `forward` was given."""
        ...

    def row_places(self, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Where rows of a head belong, from what `FamilyObjective.rows` gave: the image of each among the pack's, -1
        for none, and its number among the image's rows; int64 [R] both."""
        ...


class LanguageGolden(GoldenFormat):
    """Cases that hold nothing of the family's own; with no `heads`, nobody asks for predictions and rows."""

    def predictions(self, head: torch.nn.Module, given: tuple[Any, ...]) -> torch.Tensor:
        """See `GoldenFormat.predictions`."""
        raise NotImplementedError

    def row_places(self, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """See `GoldenFormat.row_places`."""
        raise NotImplementedError
