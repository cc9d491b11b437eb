"""The perceptual loss: its files, what is wrong with them, and its value. `tests/verification` has lpips' numbers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_eve.config import ConfigError
from megatron_eve.models.towers.perceptual import (
    PerceptualLoss,
    check_perceptual,
    load_perceptual,
    random_perceptual,
)

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """Of a VGG-16 and its five maps, by the names of the files that users have."""
    generator = torch.Generator().manual_seed(0)
    shapes = PerceptualLoss().shapes()
    weights = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    weights |= {name: tensor.abs() for name, tensor in weights.items() if name.startswith("lin")}
    return weights | {"classifier.0.weight": torch.zeros(4, 4)}  # torchvision's file has more than is needed


def test_one_file_or_two_of_either_kind_give_the_same_loss(tmp_path: Path, tensors: Tensors) -> None:
    whole, pickled, linear = tmp_path / "both.safetensors", tmp_path / "vgg16.pth", tmp_path / "vgg.pth"
    save_file(tensors, whole)
    torch.save({name: tensor for name, tensor in tensors.items() if "lin" not in name}, pickled)
    torch.save({name: tensor for name, tensor in tensors.items() if "lin" in name}, linear)
    one, two = load_perceptual(whole, None), load_perceptual(pickled, linear)
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert torch.equal(one(pictures[:2], pictures[1:]), two(pictures[:2], pictures[1:]))
    assert one.sha256 == (hashlib.sha256(whole.read_bytes()).hexdigest(),) and len(two.sha256) == 2
    assert not one.state_dict() and not list(one.parameters())


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def of_vgg_with_batch_norm(tensors: Tensors) -> Tensors:
    return tensors | {"features.2.weight": torch.ones(64), "features.2.bias": torch.zeros(64)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (of_vgg_with_batch_norm, "features.2.weight is [64], and [64, 64, 3, 3] in VGG-16"),
        (without("features.28.bias"), "holds no features.28.bias, so it is not the VGG-16 of torchvision"),
        (without("lin3.model.1.weight"), "holds no lin3.model.1.weight; name the file of lpips' five maps"),
    ],
)
def test_weights_of_another_network_are_refused_by_their_first_wrong_tensor(
    tmp_path: Path, tensors: Tensors, change: Callable[[Tensors], Tensors], sentence: str
) -> None:
    file = tmp_path / "vgg16.safetensors"
    save_file(change(tensors), file)
    for read in (check_perceptual, load_perceptual):
        with pytest.raises(ConfigError, match=re.escape(f"--perceptual-weights {file}: {sentence}")):
            read(file, None)


def test_files_that_are_none_are_refused(tmp_path: Path, tensors: Tensors) -> None:
    with pytest.raises(ConfigError, match=r"--perceptual-weights .*none.pth: is no file"):
        check_perceptual(tmp_path / "none.pth", None)
    page = tmp_path / "vgg16.pth"
    page.write_text("<!doctype html><p>404", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"vgg16.pth: cannot be read: it is a web page"):
        check_perceptual(page, None)
    file = tmp_path / "vgg16.safetensors"
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"--perceptual-linear .*vgg16.pth: cannot be read"):
        check_perceptual(file, page)


def test_equal_pictures_are_at_distance_0_and_flat_ones_have_a_gradient() -> None:
    loss = random_perceptual(3, width=4)
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert torch.equal(loss(pictures, pictures), torch.zeros(2))
    near, far = loss(pictures, 0.9 * pictures), loss(pictures, -pictures)
    assert (near > 0).all() and (near < far).all()
    dead = random_perceptual(3, width=4)
    dead.features_0_bias.fill_(-100)  # all features of the first level are 0, whose root has no gradient
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    dead(flat, pictures[:1]).sum().backward()
    assert flat.grad is not None and flat.grad.isfinite().all()


def test_random_weights_are_those_of_the_seed() -> None:
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    one, same, other = (random_perceptual(seed, 4)(pictures[:1], pictures[1:]) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
