"""What a matrix product costs, for counts of model FLOPs (`training/monitoring/flops.py` says what is counted).

A multiply-add is 2 FLOPs. The factors say what a product costs over a step, in units of its forward pass.
"""

from __future__ import annotations

TRAINED = 3
"""Forward, gradient of the input and of the weight, or of both inputs of an attention product."""
FROZEN = 2
"""Forward, gradient of the input."""
FROM_PIXELS = 2
"""Forward, gradient of the weight."""
FORWARD = 1


def matrix(inputs: int, outputs: int) -> int:
    """FLOPs of one row times a matrix."""
    return 2 * inputs * outputs


def attention(pairs: int, width: int) -> int:
    """FLOPs of the two products of attention, scores and weighted values: heads together are `width` wide."""
    return 2 * (2 * pairs * width)
