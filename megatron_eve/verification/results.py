"""Rows of a verification table: one for each tensor or case, with its error, its tolerance and whether it passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_eve.models.golden_format import Comparison

# Float32 tolerances (relative L2; absolute for losses).
ACTIVATIONS = 5e-6
LOSSES = 1e-5
GRADIENTS = 5e-5
# The same numbers, added in the same order.
ROUNDING = 1e-6
_TOLERANCES = {"activation": ACTIVATIONS, "gradient": GRADIENTS, "rounding": ROUNDING}
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


def distance(name: str, ours: torch.Tensor, golden: torch.Tensor, tolerance: float) -> CheckResult:
    """L2 distance of two tensors of one shape."""
    return CheckResult(name, (ours.cpu().double() - golden.double()).norm().item(), tolerance)


def absolute(name: str, ours: float, golden: float, tolerance: float) -> CheckResult:
    """Absolute difference of two numbers."""
    return CheckResult(name, abs(ours - golden), tolerance)


def equal(name: str, differences: int) -> CheckResult:
    """A comparison that must be exact: how many entries differ."""
    return CheckResult(name, float(differences), 0.0)


def compared(one: Comparison) -> CheckResult:
    """The row of what a family compares by itself; exact ones count the entries that differ."""
    if one.kind != "exact":
        return relative(one.name, one.ours, one.golden, _TOLERANCES[one.kind])
    if one.ours.shape != one.golden.shape:
        return CheckResult(
            f"{one.name} (shape {tuple(one.ours.shape)}, golden {tuple(one.golden.shape)})", float("inf"), 0.0
        )
    return equal(one.name, int((one.ours.cpu() != one.golden).sum()))


def gathered(rows: list[CheckResult]) -> list[CheckResult]:
    """Rows of all ranks; of a row on several ranks (tensor- and data-parallel) the one with the largest error."""
    every: list[list[CheckResult]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(every, rows)
    worst: dict[str, CheckResult] = {}
    for row in (row for some in every for row in some):
        if row.name not in worst or not row.error <= worst[row.name].error:
            worst[row.name] = row
    return list(worst.values())
