"""Frechet distance: values by hand, sums that do not depend on how vectors come, and a network's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_eve.config import ConfigError
from megatron_eve.evaluation.inception import Inception
from megatron_eve.evaluation.scorers.frechet import FeatureSums, frechet_distance
from tests.evaluation.toy_pictures import MeanColours, features_by_hand, write_inception


def sums(vectors: object, parts: int = 1) -> FeatureSums:
    found = FeatureSums()
    for part in np.array_split(np.asarray(vectors, dtype=np.float64), parts):
        found.add(part)
    return found


def test_values_by_hand() -> None:
    # Variances 2 and 8, means 1 and 4: (1 - 4)^2 + 2 + 8 - 2 sqrt(2 * 8) = 11.
    assert frechet_distance(sums([[0], [2]]), sums([[2], [6]])) == pytest.approx(11)
    # Independent features add: the second has variances 0 and 2, and equal means.
    one, other = sums([[0, 5], [2, 5]]), sums([[2, 4], [6, 6]])
    covariance = np.array([[8.0, 4.0], [4.0, 2.0]])
    assert np.allclose(other.covariance, covariance) and np.allclose(one.covariance, [[2, 0], [0, 0]])
    # (S1 S2) has the eigenvalues 16 and 0, whose roots are 4 and 0: 9 + (2 + 0) + (8 + 2) - 2 * 4.
    assert frechet_distance(one, other) == pytest.approx(13)
    shifted = sums(np.eye(3) + np.array([1, 2, 3]))
    assert frechet_distance(sums(np.eye(3)), shifted) == pytest.approx(14)


def test_equal_sets_are_at_0_and_order_and_parts_do_not_count() -> None:
    vectors = np.random.default_rng(0).normal(1000, 3, (50, 7))
    assert frechet_distance(sums(vectors), sums(vectors[::-1], 9)) == pytest.approx(0, abs=1e-9)
    found = sums(vectors, 50)
    assert np.allclose(found.mean, vectors.mean(axis=0), rtol=1e-14)
    assert np.allclose(found.covariance, np.cov(vectors, rowvar=False), rtol=1e-9)


def test_it_agrees_with_the_root_of_the_product() -> None:
    """The formula as it is published, with scipy's root of a matrix that is not symmetric."""
    linalg = pytest.importorskip("scipy.linalg")
    random = np.random.default_rng(1)
    one = random.normal(size=(40, 6)) @ random.normal(size=(6, 6))
    other = random.normal(1, size=(30, 6)) @ random.normal(size=(6, 6))
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    apart = one.mean(axis=0) - other.mean(axis=0)
    root = linalg.sqrtm(first @ second)
    wanted = apart @ apart + np.trace(first + second - 2 * root).real
    assert frechet_distance(sums(one), sums(other, 4)) == pytest.approx(wanted, rel=1e-9)
    # Fewer vectors than features: covariances without full rank.
    assert frechet_distance(sums(one[:3]), sums(one[:3])) == pytest.approx(0, abs=1e-6)


def test_what_has_no_distance_is_said() -> None:
    with pytest.raises(ValueError, match="the covariance of 1 vectors"):
        frechet_distance(sums([[1, 2]]), sums([[1, 2], [3, 4]]))
    with pytest.raises(ValueError, match="vectors of 2 features and of 1"):
        frechet_distance(sums([[1, 2]]), sums([[1], [2]]))
    with pytest.raises(ValueError, match="vectors of 1 features after some of 2"):
        sums([[1, 2]]).add(np.zeros((1, 1)))


def test_a_network_reads_pictures_of_all_sizes(tmp_path: Path) -> None:
    network = Inception(write_inception(tmp_path / "inception.pt"))
    random = np.random.default_rng(0)
    sizes = [(8, 8), (8, 8), (4, 6), (8, 8), *[(2, 2)] * 40]
    pictures = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    found = list(network.features(pictures))
    assert [len(one) for one in found] == [2, 1, 1, 32, 8]
    assert np.allclose(np.concatenate(found), features_by_hand(pictures), atol=1e-4)


class Wrong(MeanColours):
    """Gives pictures in the place of features."""

    def forward(self, pixels: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return pixels.float()


class OneArgument(torch.nn.Module):
    """Takes pictures alone."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Wrong(), "it gives [2, 3, 299, 299] for two pictures"),
        (OneArgument(), "argument"),
        (None, "inception-2015-12-05.pt, see docs/evaluation.md"),
    ],
)
def test_another_file_is_one_sentence(tmp_path: Path, module: torch.nn.Module | None, says: str) -> None:
    path = tmp_path / "other.pt"
    with pytest.raises(ConfigError, match=f"--inception-weights {path}: no such file"):
        Inception(path)
    if module is None:
        path.write_bytes(b"weights")
    else:
        torch.jit.save(torch.jit.script(module), str(path))
    with pytest.raises(ConfigError) as error:
        Inception(path)
    assert str(error.value).startswith(
        f"--inception-weights {path}: not the TorchScript file"
    ) and says in str(error.value)
    assert "\n" not in str(error.value)
