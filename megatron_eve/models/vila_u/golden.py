"""VILA-U's golden cases: see `GoldenFormat`. Imports no torch at its top."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eve.models.golden_format import (
    Comparison,
    GoldenBatch,
    GoldenRow,
    LanguageGolden,
    read_case_file,
)
from megatron_eve.models.vila_u.golden_batches import code_comparisons, has_batches, read_batches
from megatron_eve.models.vila_u.golden_head import head_comparisons, is_head_case
from megatron_eve.models.vila_u.golden_rows import read_rows
from megatron_eve.models.vila_u.hf.layouts import DEPTH_KEYS
from megatron_eve.models.vila_u.templates import SPECIAL_TOKENS

if TYPE_CHECKING:
    import torch

    from megatron_eve.models.model_parts import Pack, VisualInputs
    from megatron_eve.models.vila_u.visual_head import VisualRows


class VILAUGolden(LanguageGolden):
    """See `GoldenFormat`: batches of the public code, its rows of text, and its depth transformer alone."""

    losses: Mapping[str, str] = {"image_loss": "visual loss"}
    heads: Mapping[str, tuple[str, str]] = {"visual loss": ("image_logits", "image_targets")}
    without_gradient = re.compile(re.escape(DEPTH_KEYS) + r".*\.attn\.key\.bias")

    def reads(self, folder: Path) -> bool:
        """See `GoldenFormat.reads`."""
        return has_batches(folder) or _has_rows(folder) or is_head_case(folder)

    def batches(self, folder: Path) -> Sequence[GoldenBatch]:
        """See `GoldenFormat.batches`."""
        return read_batches(folder) if has_batches(folder) else []

    def rows(self, folder: Path) -> Iterator[GoldenRow]:
        """See `GoldenFormat.rows`."""
        return read_rows(folder) if _has_rows(folder) else iter(())

    def comparisons(self, folder: Path) -> Iterator[Comparison]:
        """See `GoldenFormat.comparisons`: the codes of all pictures, or the depth transformer alone."""
        if is_head_case(folder):
            return head_comparisons(folder)
        return code_comparisons(folder) if has_batches(folder) else iter(())

    def front_end_outputs(self, front_end: Any, visual: VisualInputs) -> Mapping[str, Sequence[torch.Tensor]]:
        """See `GoldenFormat.front_end_outputs`: rows of the projector."""
        return {"image_features": front_end(visual).split(visual.grids.prod(1).tolist())}

    def predictions(self, head: torch.nn.Module, given: tuple[Any, ...]) -> torch.Tensor:
        """See `GoldenFormat.predictions`: logits of all depths of a position, [R, D * K]."""
        hidden, _, _, inputs = given
        logits: torch.Tensor = head.logits(hidden, inputs)  # type: ignore[operator]
        return logits.flatten(1)

    def row_places(self, rows: VisualRows, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """See `GoldenFormat.row_places`: numbered among all positions of the sample that are drawn."""
        import torch

        images = torch.arange(len(pack.image_rows)).repeat_interleave(pack.image_rows)
        drawn = images[pack.drawn[images].nonzero()[:, 0]]
        samples = torch.bucketize(pack.image_starts[drawn], pack.cu_seqlens_padded[1:].long(), right=True)
        numbers = torch.full((len(images),), -1)
        numbers[pack.drawn[images]] = torch.arange(len(samples)) - torch.searchsorted(samples, samples)
        return images[rows.positions], numbers[rows.positions]


def _has_rows(folder: Path) -> bool:
    """Does a folder hold rows of text with control tokens of this family?"""
    if not all((folder / name).is_file() for name in ("meta.json", "outputs.safetensors")):
        return False
    shown = read_case_file(folder / "meta.json").get("decoded")
    return isinstance(shown, dict) and any(SPECIAL_TOKENS[0] in str(text) for text in shown.values())
