"""Compare the losses of two runs, as their losses.jsonl hold them: the exact floats, iteration by iteration."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A hash of the samples of an iteration.
SAMPLES = "sample_ids_sha256"


def read_losses(path: Path) -> list[dict[str, Any]]:
    """The records of a losses.jsonl, an iteration each."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True)
class Comparison:
    """The result of comparing the losses of two runs.

    Attributes:
        text: for the table.
        first: iteration at which they differ first, None if they are equal.
        largest: largest relative difference of any loss or gradient norm; infinite where a value is missing or the
            samples are not the same.
    """

    text: str
    first: int | None
    largest: float


def compare(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Comparison:
    """Compare the records of two runs: every loss and gradient norm as the exact float, and the samples.

    Args:
        a, b: as `read_losses` gives them.
    """
    first, message, largest = None, "", 0.0
    for i in range(max(len(a), len(b))):
        if i >= min(len(a), len(b)):
            difference, text = math.inf, f"one run has {len(a)} iterations, the other {len(b)}"
        else:
            difference, text = _compare_iteration(a[i], b[i])
        if text and first is None:
            first, message = i + 1, text
        largest = max(largest, difference)
    if first is None:
        return Comparison(f"equal at all {len(a)} iterations", None, 0.0)
    return Comparison(
        f"differs at iteration {first}: {message}; largest relative difference {largest:.1e}", first, largest
    )


def _compare_iteration(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, str]:
    """The largest relative difference of an iteration's values, and a message about the first that differs (or "")."""
    if a.get(SAMPLES) != b.get(SAMPLES):
        return math.inf, "the samples are not the same"
    mine, theirs = _values(a), _values(b)
    if set(mine) != set(theirs):
        return math.inf, f"one run has {', '.join(sorted(mine))}, the other {', '.join(sorted(theirs))}"
    largest, text = 0.0, ""
    for name, value in mine.items():
        other = theirs[name]
        # Also where both are NaN; and 0.0 is not -0.0.
        if value.hex() == other.hex():
            continue
        difference = abs(value - other) / max(abs(value), abs(other)) if value != other else 0.0
        largest = max(largest, difference if math.isfinite(difference) else math.inf)
        text = text or f"{name} {value!r} and {other!r} (relative difference {difference:.1e})"
    return largest, text


def _values(record: dict[str, Any]) -> dict[str, float]:
    """Losses and gradient norm of a record by name; null (written for values that are not finite) becomes NaN."""
    names = [name.removesuffix("_hex") for name in record if name.endswith("_hex")]
    values = {name.replace("_", " "): float.fromhex(record[f"{name}_hex"]) for name in names}
    norm = record["grad_norm"]
    return {**values, "grad norm": math.nan if norm is None else float(norm)}
