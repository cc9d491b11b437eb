"""Megatron's notation for several datasets and for a split: `--data-path 0.3 a 0.7 b`, `--split 99,1`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_eve.config.errors import ConfigError

# Period of a blend in samples (`data/sampling/orders.py`): the smallest share is one sample of a period.
BLEND_PERIOD = 1 << 16


@dataclass(frozen=True)
class Blend:
    """The datasets of a run and their weights.

    Attributes:
        prefixes: of the datasets.
        weights: one for each, of any positive sum; None reads each sample of all of them once an epoch.
    """

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None = None


def parse_blend(words: Sequence[str], flag: str = "--data-path") -> Blend:
    """Parse prefixes, or alternating weights and prefixes.

    Raises:
        ConfigError: a weight without a prefix, one that is not positive or too small, or a prefix that comes twice.
    """
    weights = [_number(word) for word in words[::2]]
    if len(words) > 1 and len(words) % 2 == 0 and None not in weights:
        prefixes, shares = tuple(words[1::2]), tuple(weight for weight in weights if weight is not None)
        for weight, prefix in zip(shares, prefixes, strict=True):
            if not (weight > 0 and math.isfinite(weight)):
                raise ConfigError(
                    f"{flag} {weight:g} {prefix}: a weight must be positive; leave the dataset out instead"
                )
        for weight, prefix in zip(shares, prefixes, strict=True):
            if weight / sum(shares) * BLEND_PERIOD < 1:
                raise ConfigError(
                    f"{flag} {weight:g} {prefix}: this share is less than one sample in {BLEND_PERIOD}; give it more "
                    "weight, or leave the dataset out"
                )
    else:
        prefixes, shares = tuple(words), None
    resolved = [Path(prefix).resolve() for prefix in prefixes]
    for prefix, path in zip(prefixes, resolved, strict=True):
        if _number(prefix) is not None:
            raise ConfigError(
                f"{flag} {' '.join(words)}: give prefixes alone, or a weight before each of them (0.3 a 0.7 b)"
            )
        if resolved.count(path) > 1:
            raise ConfigError(f"{flag} {prefix}: comes twice; give it a larger weight instead")
    return Blend(prefixes, shares)


def parse_split(text: str) -> float:
    """Parse `99,1`, the shares of training and held-out samples.

    Returns:
        The held-out fraction of the samples, 0 .. 1.

    Raises:
        ConfigError: not two numbers of which the first is positive and the second is not negative.
    """
    numbers = [_number(word) for word in text.split(",")]
    known = [number for number in numbers if number is not None and 0 <= number < math.inf]
    if len(numbers) != 2 or len(known) != 2 or not known[0]:
        raise ConfigError(
            f"--split {text}: two numbers, the shares of training and of held-out samples, such as 99,1"
        )
    return known[1] / sum(known)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
