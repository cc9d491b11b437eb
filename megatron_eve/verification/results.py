"""Rows of a verification table: one for each tensor or case, with its error, its tolerance and whether it passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Float32 tolerances (relative L2; absolute for losses).
ACTIVATIONS = 5e-6
LOSSES = 1e-5
GRADIENTS = 5e-5
# A gradient below this is rounding noise of the reference: its error is divided by this floor instead of its norm.
SMALLEST_NORM = 1e-4


@dataclass(frozen=True)
class CheckResult:
    """One comparison."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """True if the error is within tolerance; False if it is not a number."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return f"{self.name:<76s} {self.error:9.2e} {self.tolerance:9.1e}  {'ok' if self.ok else 'MISS'}"


def relative(name: str, ours: torch.Tensor, golden: torch.Tensor, tolerance: float) -> CheckResult:
    """Relative L2 distance of two tensors of one shape; another shape is a miss."""
    if ours.shape != golden.shape:
        return CheckResult(
            f"{name} (shape {tuple(ours.shape)}, golden {tuple(golden.shape)})", float("inf"), tolerance
        )
    ours, golden = ours.cpu().double(), golden.double()
    scale = max(golden.norm().item(), SMALLEST_NORM)
    return CheckResult(name, ((ours - golden).norm() / scale).item(), tolerance)


def absolute(name: str, ours: float, golden: float, tolerance: float) -> CheckResult:
    """Absolute difference of two numbers."""
    return CheckResult(name, abs(ours - golden), tolerance)


def equal(name: str, differences: int) -> CheckResult:
    """A comparison that must be exact: how many entries differ."""
    return CheckResult(name, float(differences), 0.0)
