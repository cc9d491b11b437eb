"""Shuffled sample order: a keyed permutation, computed on demand.

Position ``p`` of a run lies in epoch ``p // size``. Inside an epoch the order is a permutation of the dataset
that depends on (seed, epoch) alone. Nothing is built, stored or cached, so the cost does not depend on the size
of the dataset, and a run resumes at any position without replaying earlier ones.

The permutation is an alternating Feistel network over the smallest power of two that holds the dataset, with
cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", methods 2 and 3): a value
outside the dataset is enciphered again until it is inside.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MASK_64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = 8
_LARGEST_SIZE = 1 << 62


def sample_order(
    positions: NDArray[np.int64], size: int, seed: int, shuffle: bool = True
) -> NDArray[np.int64]:
    """Dataset indices at the given positions of a run over several epochs.

    Args:
        positions: int64 array of any shape, positions counted from the start of the run (0 = first sample).
        size: number of samples in the dataset, 1 .. 2^62.
        seed: any integer; its low 64 bits are the key.
        shuffle: False keeps the order of the dataset.

    Returns:
        int64 array of the shape of ``positions``. Over each epoch (``size`` positions in a row, starting at a
        multiple of ``size``) every index of the dataset occurs exactly once.

    Raises:
        ValueError: size out of range, or a negative position.
    """
    positions = np.asarray(positions, dtype=np.int64)
    if not 1 <= size <= _LARGEST_SIZE:
        raise ValueError(f"a dataset of {size} samples has no order; the size must be 1 .. 2^62")
    if positions.size and int(positions.min()) < 0:
        raise ValueError(
            f"position {int(positions.min())} is negative; positions count from the start of the run"
        )
    if not shuffle:
        return positions % size

    epochs = (positions // size).astype(np.uint64).ravel()
    values = (positions % size).astype(np.uint64).ravel()
    keys = _mix(np.uint64(seed & _MASK_64) + np.uint64(_GOLDEN_GAMMA) * (epochs + np.uint64(1)))
    bits = max(2, (size - 1).bit_length())

    outside = np.arange(values.size)
    while outside.size:  # cycle walking, at most two rounds on average
        values[outside] = _encipher(values[outside], keys[outside], bits)
        outside = outside[values[outside] >= np.uint64(size)]
    return values.astype(np.int64).reshape(positions.shape)


def inverse_sample_order(samples: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Inverse of `sample_order`: positions of the given samples in the first epoch.

    Args:
        samples: int64 [n] dataset indices, 0 .. size - 1.
        size, seed: as for `sample_order`.

    Returns:
        int64 [n].
    """
    values = samples.astype(np.uint64)
    keys = _mix(np.full(len(values), (seed + _GOLDEN_GAMMA) & _MASK_64, dtype=np.uint64))
    bits = max(2, (size - 1).bit_length())
    outside = np.arange(values.size)
    while outside.size:
        values[outside] = _encipher(values[outside], keys[outside], bits, backwards=True)
        outside = outside[values[outside] >= np.uint64(size)]
    return values.astype(np.int64)


def _encipher(
    values: NDArray[np.uint64], keys: NDArray[np.uint64], bits: int, backwards: bool = False
) -> NDArray[np.uint64]:
    """A keyed bijection of the integers below 2^bits: each half is XORed with a keyed function of the other.

    Each round is its own inverse, so running the rounds backwards inverts the whole.
    """
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    high, low = values >> low_bits, values & low_mask
    for number in reversed(range(_ROUNDS)) if backwards else range(_ROUNDS):
        round_keys = _mix(keys + np.uint64(_GOLDEN_GAMMA * (number + 1) & _MASK_64))
        if number % 2 == 0:
            high = high ^ (_mix(low + round_keys) & high_mask)
        else:
            low = low ^ (_mix(high + round_keys) & low_mask)
    return (high << low_bits) | low


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014); arithmetic modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
