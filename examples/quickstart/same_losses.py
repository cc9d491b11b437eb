"""The losses of two runs, compared bit for bit."""

from __future__ import annotations

from typing import Any

from launch import StepFailed
from report import Records


def require_same_losses(reference: Records, other: Records, iterations: int) -> None:
    """Compare the exact losses of two runs at every iteration, repeated ones included.

    Raises:
        StepFailed: naming the first iteration that differs or is missing.
    """
    expected = {record["iteration"]: _exact(record) for record in reference}
    reached = {record["iteration"] for record in other}
    missing = set(range(1, iterations + 1)) - (reached & set(expected))
    if missing:
        raise StepFailed(f"no loss was recorded for iteration {min(missing)}")
    for record in other:
        iteration, found = record["iteration"], _exact(record)
        if found != expected[iteration]:
            raise StepFailed(
                f"iteration {iteration}: the losses are {found}, uninterrupted {expected[iteration]}"
            )


def _exact(record: dict[str, Any]) -> str:
    """The losses of an iteration, digit for digit."""
    return " and ".join(value for name, value in record.items() if name.endswith("_hex"))
