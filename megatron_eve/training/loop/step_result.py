"""What a training step gives: losses, gradient norm, and whether they can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

Values = dict[str, float]


@dataclass(frozen=True)
class StepResult:
    """What came of a step, the same on every rank.

    Attributes:
        losses: by the name of the objective.
        grad_norm: before any clipping.
        bad: what is wrong with it; None if nothing is, and only then was an update made.
        exit_code: nonzero if the run must end here, without an update.
    """

    losses: Values
    grad_norm: float
    bad: str | None = None
    exit_code: int = 0

    @property
    def values(self) -> Values:
        """Losses and gradient norm, by name."""
        return {**self.losses, "grad norm": self.grad_norm}
