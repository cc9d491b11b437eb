"""VILA's golden cases: see `GoldenFormat`. Imports no torch at its top."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eve.models.golden_format import (
    Comparison,
    GoldenBatch,
    GoldenPicture,
    GoldenRow,
    LanguageGolden,
    read_case_file,
)
from megatron_eve.models.vila.golden_batches import has_batches, read_batches
from megatron_eve.models.vila.golden_rows import read_rows
from megatron_eve.models.vila.hf.layouts import TOWER_KEYS

if TYPE_CHECKING:
    import torch

    from megatron_eve.models.model_parts import VisualInputs

# What the case of pictures calls a processor: the tower with its side in pixels, and how a picture becomes a square.
_PROCESSOR = re.compile(r"(.+)\.(?:clip|siglip|vilau)(\d+)_(pad|square|resize|processor)")
_FITS = {"pad": "pad", "square": "crop", "resize": "stretch", "processor": "stretch"}
_PROJECTORS = "mlp2x_gelu.safetensors"


class VILAGolden(LanguageGolden):
    """See `GoldenFormat`: cases are batches of the public code, its pictures, and its projectors alone."""

    recomputing: Mapping[str, Any] = {"recompute_vision": True}
    without_gradient = re.compile(re.escape(TOWER_KEYS) + r".*\.self_attn\.k_proj\.bias")

    def reads(self, folder: Path) -> bool:
        """See `GoldenFormat.reads`."""
        return bool(has_batches(folder) or _picture_cases(folder) or (folder / _PROJECTORS).is_file())

    def batches(self, folder: Path) -> Sequence[GoldenBatch]:
        """See `GoldenFormat.batches`."""
        return list(read_batches(folder)) if has_batches(folder) else []

    def rows(self, folder: Path) -> Iterator[GoldenRow]:
        """See `GoldenFormat.rows`."""
        return read_rows(folder)

    def pictures_alone(self, folder: Path) -> Iterator[GoldenPicture]:
        """See `GoldenFormat.pictures_alone`."""
        for name, fields in _picture_cases(folder).items():
            match = _PROCESSOR.fullmatch(name)
            assert match is not None
            file, side, kind = match.groups()
            settings = {"image_size": int(side), "image_fit": _FITS[kind]}
            yield GoldenPicture(
                name, folder / "raw" / f"{file}.png", settings, "tower", fields["sha256_u8_chw"]
            )

    def comparisons(self, folder: Path) -> Iterator[Comparison]:
        """See `GoldenFormat.comparisons`: the projectors."""
        if not (folder / _PROJECTORS).is_file():
            return iter(())
        from megatron_eve.models.vila.golden_projectors import projector_comparisons

        return projector_comparisons(folder)

    def front_end_outputs(self, front_end: Any, visual: VisualInputs) -> Mapping[str, Sequence[torch.Tensor]]:
        """See `GoldenFormat.front_end_outputs`: features of the tower, and rows of the projector."""
        from megatron_eve.models.towers.sharing import shared_features

        count, patches = len(visual.grids), front_end.tower.settings.patches
        if not count:
            return {"vision_features": [], "image_features": []}
        features = shared_features(front_end.tower, visual.pixels["tower"], count)
        features = features[: count * patches].view(count, patches, -1)
        return {"vision_features": features, "image_features": front_end.projector(features)}


def _picture_cases(folder: Path) -> dict[str, Any]:
    """What meta.json says of pictures through published processors, by name; {} where it says nothing."""
    path = folder / "meta.json"
    if not (path.is_file() and (folder / "raw").is_dir()):
        return {}
    cases = read_case_file(path).get("cases")
    if not isinstance(cases, dict):
        return {}
    return {name: fields for name, fields in cases.items() if _PROCESSOR.fullmatch(name)}
