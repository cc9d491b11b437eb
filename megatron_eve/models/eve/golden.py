"""EVE's golden cases: see `GoldenFormat`. Imports no torch at its top."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eve.models.eve.geometry import PATCH_SIZE
from megatron_eve.models.eve.objectives import Aligning
from megatron_eve.models.family import ImagePlan, View
from megatron_eve.models.golden_format import GoldenFormat

if TYPE_CHECKING:
    import torch

    from megatron_eve.models.eve.aligned_rows import AlignedRows
    from megatron_eve.models.model_parts import Pack, VisualInputs

# The published configuration's name of the teacher's folder, beside that of the weights in the cases.
_TEACHER = "mm_vision_tower_clip"
_TEACHER_SIZE = 336


class EVEGolden(GoldenFormat):
    """See `GoldenFormat`."""

    sizes: Mapping[str, Mapping[str, int]] = {
        str(size): {"image_size": size, "teacher_size": _TEACHER_SIZE} for size in (672, 1344)
    }
    losses: Mapping[str, str] = {"clip_loss": Aligning.name}
    gradients: Mapping[str, str] = {"clip_loss": "grad_clip."}
    heads: Mapping[str, tuple[str, str]] = {Aligning.name: ("pal_pred", "pal_teacher")}

    def settings(self, meta: Mapping[str, Any], folder: Path, outputs: Collection[str]) -> dict[str, Any]:
        """See `GoldenFormat.settings`: with the aligning layer, where the case has its loss and the teacher."""
        found = {"image_size": meta["image_size"], "teacher_size": meta["image_size_clip"]}
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        teacher = folder.resolve().parent / fields[_TEACHER]
        if "clip_loss" in outputs and (teacher / "config.json").is_file():
            width = json.loads((teacher / "config.json").read_text(encoding="utf-8"))["hidden_size"]
            found |= {"teacher_hidden_size": width, "patch_aligning": True, "teacher_model": str(teacher)}
        return found

    def pictures(self, plan: ImagePlan, sizes: Mapping[str, Any]) -> Mapping[str, View]:
        """See `GoldenFormat.pictures`: both published squares, the model's and the teacher's."""
        resized, image_size = plan.views["patches"], sizes["image_size"]
        model = View(
            resized.width,
            resized.height,
            resized.pad_colour,
            square=image_size,
            margin_unit=PATCH_SIZE * image_size // sizes["teacher_size"],
        )
        return {"eve": model, "clip": plan.views["teacher"]}

    def front_end_outputs(self, front_end: Any, visual: VisualInputs) -> Mapping[str, Sequence[torch.Tensor]]:
        """See `GoldenFormat.front_end_outputs`: class token and merged patches of the patch embedding."""
        grids = visual.grids
        rows = front_end.patch_embedding(visual.pixels["patches"], grids)
        images = rows.split((1 + grids[:, 0] * (grids[:, 1] + 1)).tolist())
        local = [
            image[1:].reshape(height, width + 1, -1)[:, :width].flatten(0, 1)
            for image, (height, width) in zip(images, grids.tolist(), strict=True)
        ]
        return {"pel_class": [image[:1] for image in images], "pel_local": local}

    def predictions(self, head: Any, given: tuple[Any, ...]) -> torch.Tensor:
        """See `GoldenFormat.predictions`: the teacher's features, as the aligning layer would have them."""
        hidden, features, rows, _ = given
        predicted: torch.Tensor = head.predict(rows.take(hidden), features)
        return predicted

    def row_places(self, rows: AlignedRows, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """See `GoldenFormat.row_places`: counted over the teacher patches of their image."""
        widths = rows.grids[rows.images.clamp(min=0), 1] if len(rows.grids) else 0
        return rows.images, rows.patches[:, 0] * widths + rows.patches[:, 1]
