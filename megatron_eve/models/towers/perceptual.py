"""The perceptual loss of towers that make pictures (LPIPS, arXiv 1801.03924): distances of features of a VGG-16.

Follows PyPI's lpips 0.1.4 with `net="vgg"`, without its dropout. Plain torch: the registry's torchvision does not
import beside the CPU build of torch. Weights come from files (`load_perceptual`), or are random for toy runs.

Shapes: n = pictures, S = their side in pixels, at least 16.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from megatron_eve.config.errors import ConfigError
from megatron_eve.models.hf_folder import HFFolder
from megatron_eve.models.towers.tower_training import PERCEPTUAL_LEVELS
from megatron_eve.runtime.digests import file_digest

WEIGHTS_FLAG, LINEAR_FLAG = "--perceptual-weights", "--perceptual-linear"

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10
# The smallest squared length of features: the square root of 0 has no gradient.
_SMALLEST = 1e-20


class PerceptualLoss(nn.Module):
    """Distance of pictures: squared differences of the features behind the last ReLU of each of VGG-16's five levels,
    of unit length, weighted by channel, as a mean over positions and a sum over levels. Nothing in it trains.

    Attributes:
        sha256: of the files that the weights are from; none of random ones.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, width: int = 64) -> None:
        """Zeros, for weights of a file. Nothing of it is in a state dict.

        Args:
            width: channels of the first level; 64 is VGG-16.
        """
        super().__init__()
        self.width = width
        self.sha256: tuple[str, ...] = ()
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        for name, shape in self.shapes().items():
            self.register_buffer(name.replace(".", "_"), torch.zeros(shape), persistent=False)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its weights by torchvision's names (`features.0.weight`) and lpips' (`lin0.model.1.weight`)."""
        return _shapes(self.width)

    def load(self, tensors: dict[str, torch.Tensor]) -> PerceptualLoss:
        """Take weights by the names of `shapes`; those that are left out stay as they are."""
        for name, tensor in tensors.items():
            getattr(self, name.replace(".", "_")).copy_(tensor)
        return self

    def forward(self, pictures: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Distances of pictures from others.

        Args:
            pictures, others: [n, 3, S, S], -1 .. 1; computed in the weights' float32.

        Returns:
            [n]; 0 for equal pictures.
        """
        total = torch.zeros(len(pictures), dtype=self.shift.dtype, device=pictures.device)
        for level, (ours, theirs) in enumerate(
            zip(self._features(pictures), self._features(others), strict=True)
        ):
            linear = getattr(self, f"lin{level}_model_1_weight")
            difference = _of_unit_length(ours) - _of_unit_length(theirs)
            total = total + functional.conv2d(difference.square(), linear).mean((1, 2, 3))
        return total

    def _features(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """Behind the last ReLU of each level."""
        hidden = (pictures.to(self.shift.dtype) - self.shift) / self.scale
        number = 0
        found: list[torch.Tensor] = []
        for convolutions, _ in PERCEPTUAL_LEVELS:
            if found:
                hidden = functional.max_pool2d(hidden, 2)
                number += 1
            for _ in range(convolutions):
                weight, bias = (getattr(self, f"features_{number}_{name}") for name in ("weight", "bias"))
                hidden = functional.conv2d(hidden, weight, bias, padding=1).relu()
                number += 2
            found.append(hidden)
        return found


def _of_unit_length(features: torch.Tensor) -> torch.Tensor:
    length = features.square().sum(1, keepdim=True).clamp_min(_SMALLEST).sqrt()
    return features / (length + _EPSILON)


def load_perceptual(weights: Path, linear: Path | None) -> PerceptualLoss:
    """The perceptual loss with weights of files, in float32 on the CPU.

    Args:
        weights: VGG-16 of torchvision (`features.0.weight`, ...), safetensors or what torch saved.
        linear: the five maps of lpips' vgg.pth (`lin0.model.1.weight`, ...); None if they lie in the first file.

    Raises:
        ConfigError: a file that is missing or damaged, or holds another network.
    """
    tensors, flags = _open(weights, linear)
    loss = PerceptualLoss().load({name: tensors.tensor(name).float() for name in flags})
    loss.sha256 = tuple(file_digest(path) for path in (weights, linear) if path is not None)
    return loss


def check_perceptual(weights: Path, linear: Path | None) -> None:
    """Are the files those of a VGG-16 and its five maps? Reads no weights of safetensors.

    Raises:
        ConfigError: as for `load_perceptual`.
    """
    _open(weights, linear)


def random_perceptual(seed: int, width: int = 16) -> PerceptualLoss:
    """For toy runs: random features, and equal weights of all channels.

    Args:
        seed: of the random numbers.
        width: channels of the first level; 64 has the cost of VGG-16.
    """
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in _shapes(width).items():
        if name.startswith("lin"):
            tensors[name] = torch.full(shape, 1 / len(PERCEPTUAL_LEVELS))
        elif name.endswith("weight"):
            tensors[name] = torch.randn(shape, generator=generator) * (2 / (9 * shape[1])) ** 0.5
    return PerceptualLoss(width).load(tensors)


def _shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors by their names, in torchvision's order and then lpips'."""
    shapes: dict[str, tuple[int, ...]] = {}
    number, channels = 0, 3
    for level, (convolutions, multiple) in enumerate(PERCEPTUAL_LEVELS):
        number += level > 0  # the pooling
        for _ in range(convolutions):
            shapes[f"features.{number}.weight"] = (width * multiple, channels, 3, 3)
            shapes[f"features.{number}.bias"] = (width * multiple,)
            number, channels = number + 2, width * multiple
    for level, (_, multiple) in enumerate(PERCEPTUAL_LEVELS):
        shapes[f"lin{level}.model.1.weight"] = (1, width * multiple, 1, 1)
    return shapes


def _open(weights: Path, linear: Path | None) -> tuple[HFFolder, list[str]]:
    """The tensors of both files, and the names of those that are needed, all there and of the right shape."""
    names = {WEIGHTS_FLAG: weights, LINEAR_FLAG: linear or weights}
    for flag, path in names.items():
        if not path.is_file():
            raise ConfigError(f"{flag} {path}: is no file")
    shapes = _shapes(64)
    tensors = HFFolder(weights.parent, {})
    held = {}
    for flag, path in names.items():
        one = HFFolder(path.parent, {})
        try:
            one.add_file(path)
        except ConfigError as error:
            raise ConfigError(f"{flag} {error}") from None
        held[flag] = set(one.keys())
    for name, shape in shapes.items():
        flag = LINEAR_FLAG if name.startswith("lin") else WEIGHTS_FLAG
        path = names[flag]
        if name not in held[flag]:
            raise ConfigError(_missing(name, path, flag, linear))
        tensors.add_file(path, {name: name})
        if (found := tuple(tensors.describe(name)[0])) != shape:
            raise ConfigError(
                f"{flag} {path}: {name} is {list(found)}, and {list(shape)} in VGG-16; name its weights"
            )
    return tensors, list(shapes)


def _missing(name: str, path: Path, flag: str, linear: Path | None) -> str:
    if flag == LINEAR_FLAG and linear is None:
        return (
            f"{WEIGHTS_FLAG} {path}: holds no {name}; name the file of lpips' five maps (vgg.pth in that package) with "
            f"{LINEAR_FLAG}"
        )
    wanted = "the five maps of lpips (vgg.pth)" if flag == LINEAR_FLAG else "the VGG-16 of torchvision"
    return f"{flag} {path}: holds no {name}, so it is not {wanted}; name that"
