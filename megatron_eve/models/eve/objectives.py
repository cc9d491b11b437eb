"""EVE's objective beside the next token."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_eve.models.family import SampleCounts


@dataclass(frozen=True)
class Aligning:
    """The aligning layer's distance from the teacher's features; see `Objective`.

    Each tensor-parallel rank aligns its own rows under sequence parallelism.
    """

    name: str = "align loss"
    weight: float = 1.0
    adds_over_tensor_parallel: bool = True

    def count(self, counts: SampleCounts) -> int:
        """One for each image."""
        return counts.images
