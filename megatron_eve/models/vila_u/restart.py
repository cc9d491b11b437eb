"""Which vectors of a batch take the place of codes that are hardly used, in the training of a tower. Plain torch."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch


class RestartDraw(Protocol):
    """The random numbers of a step's restarts. All ranks must draw the same."""

    def draw(self, level: int, total: int) -> torch.Tensor:
        """Code k of depth `level` (from 0) restarts from vector number `result[k]`.

        Returns:
            int64 [total] on the CPU, a permutation of 0 .. total - 1.
        """
        ...

    def noise(self, level: int, shape: tuple[int, int]) -> torch.Tensor:
        """Of `shape`, uniform in [0, 1), on the CPU: for a batch with fewer vectors than codes."""
        ...


class KeyedDraw:
    """Draws that depend on seed, iteration and depth alone: not on the number of ranks, nor on earlier steps.

    Args:
        seed: of the run.
        iteration: of the step.
    """

    def __init__(self, seed: int, iteration: int) -> None:
        self._key = f"{seed} {iteration}"

    def draw(self, level: int, total: int) -> torch.Tensor:
        """See `RestartDraw.draw`."""
        return torch.randperm(total, generator=self._generator(level, "vectors"))

    def noise(self, level: int, shape: tuple[int, int]) -> torch.Tensor:
        """See `RestartDraw.noise`: float32."""
        return torch.rand(shape, generator=self._generator(level, "noise"))

    def _generator(self, level: int, use: str) -> torch.Generator:
        digest = hashlib.sha256(f"restart {self._key} {level} {use}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
