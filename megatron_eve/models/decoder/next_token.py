"""The objective of every family: the next token."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_eve.models.model_parts import SampleCounts


@dataclass(frozen=True)
class NextToken:
    """Cross entropy of the next token; see `Objective`."""

    name: str = "lm loss"
    weight: float = 1.0
    columns: tuple[str, ...] = ()
    adds_over_tensor_parallel: bool = False

    def count(self, counts: SampleCounts) -> int:
        """One for each label."""
        return counts.labels
