"""The result of a training step: losses, gradient norm, and whether the step was bad."""

from __future__ import annotations

from dataclasses import dataclass, field

Values = dict[str, float]


@dataclass(frozen=True)
class StepResult:
    """The result of a step, the same on every rank.

    Attributes:
        losses: by the name of the objective, or of the loss.
        grad_norm: before any clipping.
        bad: why the step is bad; None if it is good. Only a good step updates the weights.
        exit_code: nonzero if the run must end here, without an update.
        figures: what else is logged, by name; no step is bad for it.
    """

    losses: Values
    grad_norm: float
    bad: str | None = None
    exit_code: int = 0
    figures: Values = field(default_factory=dict)

    @property
    def values(self) -> Values:
        """Losses and gradient norm, by name."""
        return {**self.losses, "grad norm": self.grad_norm}
