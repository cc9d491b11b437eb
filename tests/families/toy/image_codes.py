"""The toy's towers: a position's codes are the digits of its mean brightness, the first the coarsest.

A folder is a config.json of the sizes. Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_eve.config.errors import ConfigError
from megatron_eve.models.image_codes import CodeTower
from megatron_eve.runtime.digests import file_digest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ToyTower:
    """See `CodeTower`.

    Attributes:
        slow: seconds that a batch takes, for tests that kill processes.
        broken: its weights cannot be loaded.
    """

    folder: Path
    image_size: int
    grid: tuple[int, int]
    depth: int
    codebook_size: int
    slow: float = 0.0
    broken: bool = False


@dataclass(frozen=True)
class ToyDigits:
    """See `CodeModel`. Brightness from 0 to 256 is cut into K parts, each of which is cut into K parts, and so on."""

    tower: ToyTower

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `CodeModel.encode`."""
        import torch

        time.sleep(self.tower.slow)
        (rows, columns), size = self.tower.grid, self.tower.image_size
        blocks = pixels.double().reshape(len(pixels), rows, size // rows, columns, size // columns, 3)
        part = blocks.mean(dim=(2, 4, 5)) / 256  # (n, h, w), in 0 .. 1
        digits = []
        for _ in range(self.tower.depth):
            part = part * self.tower.codebook_size
            digits.append(part.long())
            part = part - digits[-1]
        return torch.stack(digits, dim=-1)

    def decode(self, codes: torch.Tensor, depth: int | None = None) -> torch.Tensor:
        """See `CodeModel.decode`: the middle of the part that the digits name."""
        (rows, columns), size = self.tower.grid, self.tower.image_size
        digits = codes[..., :depth].double().unbind(-1)
        scales = [float(self.tower.codebook_size) ** -(number + 1) for number in range(len(digits))]
        part = sum(digit * scale for digit, scale in zip(digits, scales, strict=True)) + scales[-1] / 2
        picture = (part * 256).repeat_interleave(size // rows, 1).repeat_interleave(size // columns, 2)
        return picture[..., None].expand(-1, -1, -1, 3)


class ToyCodes:
    """See `ImageCodes`."""

    tower = "folder of a toy tower: a config.json of image_size, grid, depth and codebook_size"
    pad_colour = (127, 127, 127)
    golden = None
    folders = None

    def add_flags(self, parser: argparse._ActionsContainer) -> None:
        """See `ImageCodes.add_flags`: none."""

    def read_tower(self, folder: Path, flags: Mapping[str, Any]) -> ToyTower:
        """See `ImageCodes.read_tower`."""
        try:
            sizes = json.loads((folder / "config.json").read_text())
            return ToyTower(folder, **{**sizes, "grid": tuple(sizes["grid"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"--tower {folder}: is not {self.tower} ({error})") from error

    def sha256(self, tower: CodeTower) -> str:
        """See `ImageCodes.sha256`."""
        return file_digest(tower.folder / "config.json")

    def square_size(self, tower: CodeTower) -> int:
        """See `ImageCodes.square_size`."""
        assert isinstance(tower, ToyTower)
        return tower.image_size

    def load_tower(self, tower: CodeTower, device: torch.device, dtype: torch.dtype) -> ToyDigits:
        """See `ImageCodes.load_tower`."""
        assert isinstance(tower, ToyTower)
        if tower.broken:
            raise ConfigError("the weights are damaged")
        return ToyDigits(tower)

    def text_folder(self, tower: CodeTower, flags: Mapping[str, Any]) -> Path:
        """See `ImageCodes.text_folder`: a toy knows no texts."""
        raise ConfigError(f"--tower {tower.folder}: has no contrastive side; name a tower that has")

    def load_contrast(self, tower: CodeTower, texts: Path, device: torch.device) -> NoReturn:
        """See `ImageCodes.load_contrast`: nor has it a contrastive side."""
        raise ConfigError(f"--tower {tower.folder}: has no contrastive side; name a tower that has")


IMAGE_CODES = ToyCodes()
