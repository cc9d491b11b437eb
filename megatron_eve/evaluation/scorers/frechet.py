"""Frechet distance between two sets of feature vectors, from sums that grow vector by vector (FID: Heusel et al. 2017).

F = features of a picture. Everything is float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float64]


class FeatureSums:
    """Mean and covariance of vectors, without keeping these.

    Attributes:
        n: vectors so far.
    """

    def __init__(self) -> None:
        self.n = 0
        self._mean: Vectors = np.zeros(0)
        self._squares: Vectors = np.zeros((0, 0))  # sum of (x - mean) (x - mean)^T

    def add(self, features: NDArray[np.floating]) -> None:
        """Add vectors [n, F].

        Raises:
            ValueError: vectors of another width than before.
        """
        new = np.asarray(features, dtype=np.float64)
        if not len(new):
            return
        if not self.n:
            self._mean, self._squares = np.zeros(new.shape[1]), np.zeros((new.shape[1],) * 2)
        if new.shape[1] != len(self._mean):
            raise ValueError(f"vectors of {new.shape[1]} features after some of {len(self._mean)}")
        # Chan et al.: two sets join by their means, which rounds less than sums of squares do.
        mean = new.mean(axis=0)
        left, apart, total = new - mean, mean - self._mean, self.n + len(new)
        self._squares += left.T @ left + np.outer(apart, apart) * (self.n * len(new) / total)
        self._mean = self._mean + apart * (len(new) / total)
        self.n = total

    @property
    def mean(self) -> Vectors:
        """Mean of the vectors, [F]."""
        return self._mean

    @property
    def covariance(self) -> Vectors:
        """Their covariance with n - 1 in the divisor, [F, F].

        Raises:
            ValueError: of fewer than two vectors.
        """
        if self.n < 2:
            raise ValueError(f"the covariance of {self.n} vectors is not defined")
        found: Vectors = self._squares / (self.n - 1)
        return found


def frechet_distance(one: FeatureSums, other: FeatureSums) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets of vectors, which is 0 of equal sets.

    Raises:
        ValueError: a set of fewer than two vectors, or vectors of two widths.
    """
    if len(one.mean) != len(other.mean):
        raise ValueError(f"vectors of {len(one.mean)} features and of {len(other.mean)}")
    apart = one.mean - other.mean
    # tr (S1 S2)^(1/2) = tr (R S2 R)^(1/2) with R = S1^(1/2), which is symmetric: no complex roots, and covariances of
    # fewer vectors than features need no care.
    root = _root(one.covariance)
    values = np.linalg.eigvalsh(root @ other.covariance @ root)
    shared = np.sqrt(values.clip(min=0)).sum()
    distance = apart @ apart + np.trace(one.covariance) + np.trace(other.covariance) - 2 * shared
    return max(float(distance), 0.0)


def _root(covariance: Vectors) -> Vectors:
    """The symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(covariance)
    found: Vectors = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return found
