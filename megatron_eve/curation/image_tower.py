"""A frozen vision tower that makes one vector of each picture: the feature by which pictures are clustered.

The vector is the tower's pooled output (`pooler_output`), through `visual_projection` where the folder has one:

- CLIP and EVA-CLIP: the class token after the last norm, projected into the space that is shared with texts;
- SigLIP: the output of the attention pooling head;
- DINOv2: the class token after the last norm.

Shapes: i = images, S = side of the square picture in pixels, D = width of the vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_eve.config import ConfigError
from megatron_eve.config.json_file import read_settings
from megatron_eve.models.family import View
from megatron_eve.models.hf_folder import HFFolder
from megatron_eve.models.towers.hf_tower import load_tower
from megatron_eve.models.towers.normalisation import CLIP_MEAN, CLIP_STD

FLAG = "--tower"
_PREPROCESSOR = "preprocessor_config.json"
_COLOURS = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
_PROJECTION = "visual_projection.weight"  # [D, width of the tower]; its layer has no bias


@dataclass(frozen=True)
class Preprocessing:
    """How a tower is given a picture.

    Attributes:
        view: what is decoded: the picture as a square.
        side: S; the middle of the view, if that is larger.
        mean, std: of R, G, B on the scale 0..1.
    """

    view: View
    side: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


def read_preprocessing(folder: Path, image_size: int) -> Preprocessing:
    """What preprocessor_config.json says; without that file CLIP's: the middle square, CLIP's mean and deviation.

    Pictures are resized by the bicubic filter, whatever `resample` says.

    Args:
        folder: of the tower.
        image_size: S where the file does not say it, from config.json.

    Raises:
        ConfigError: the file is damaged, or asks for pictures that are not square.
    """
    path = folder / _PREPROCESSOR
    fields: Mapping[str, Any] = {}
    if path.is_file():
        fields = read_settings(path, "copy the folder again", FLAG)
    fit: Literal["crop", "stretch"]
    try:
        size = fields.get("size", image_size)
        size = size if isinstance(size, dict) else {"shortest_edge": size}
        crop = fields.get("crop_size", image_size)
        crop = crop if isinstance(crop, dict) else {"height": crop, "width": crop}
        mean, std = (tuple(map(float, fields.get(key, value))) for key, value in _COLOURS.items())
        if "shortest_edge" in size:
            resized, fit = int(size["shortest_edge"]), "crop"
            side = _square(crop) if fields.get("do_center_crop", True) else resized
        else:
            resized, fit = _square(size), "stretch"
            side = _square(crop) if fields.get("do_center_crop") else resized
        if not 0 < side <= resized or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"size {size}, crop_size {crop}, image_mean {mean}, image_std {std}")
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{FLAG} {folder}: {_PREPROCESSOR} does not say how pictures become squares ({error}); copy it again, or "
            "name another tower"
        ) from None
    return Preprocessing(View(resized, resized, (0, 0, 0), fit=fit), side, mean, std)


def _square(size: Mapping[str, Any]) -> int:
    height, width = int(size["height"]), int(size["width"])
    if height != width:
        raise ValueError(f"{height} x {width} pixels are not square")
    return height


class ImageTower:
    """A tower with its weights.

    Args:
        folder: in Hugging Face layout, of a vision tower or of a model with a text tower too.
        trust_remote_code: let Python files in the folder run.
        dtype: it computes in.
        device: where.

    Raises:
        ConfigError: a folder that cannot be loaded, lacks weights, or holds a tower without a pooled output.
    """

    def __init__(
        self, folder: Path, *, trust_remote_code: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        tower = load_tower(folder, trust_remote_code, FLAG)
        self.tower = tower.requires_grad_(False).eval().to(device=device, dtype=dtype)
        self.preprocessing = read_preprocessing(folder, int(getattr(tower.config, "image_size", 224)))
        self._mean, self._std = (
            torch.tensor(values, device=device)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        self._projection = _projection(folder, dtype, device)
        self.width = self._check()

    @torch.inference_mode()
    def __call__(self, views: torch.Tensor) -> torch.Tensor:
        """Features of pictures.

        Args:
            views: uint8 [i, V, V, 3], where V is the side of `preprocessing.view`.

        Returns:
            float32 [i, D] on the device, of length 1.
        """
        margin = (views.shape[1] - self.preprocessing.side) // 2
        inner = slice(margin, margin + self.preprocessing.side)
        images = views.to(self.device)[:, inner, inner]
        pixels = ((images.float() / 255 - self._mean) / self._std).permute(0, 3, 1, 2)
        pooled = self.tower(pixel_values=pixels.to(self.dtype)).pooler_output
        if self._projection is not None:
            pooled = pooled @ self._projection.T
        return torch.nn.functional.normalize(pooled.float(), dim=-1)

    def _check(self) -> int:
        """One grey picture through the tower, so that a wrong one is found at once; returns D."""
        side = self.preprocessing.view.width
        try:
            features = self(torch.full((1, side, side, 3), 127, dtype=torch.uint8))
        except (
            Exception
        ) as error:  # whatever a tower raises on pictures of another size, or without a pooling layer
            raise ConfigError(
                f"{FLAG} {self.folder}: gives no pooled vector of a picture of {side} x {side} pixels "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); name the folder of a CLIP, SigLIP, "
                "EVA-CLIP or DINOv2"
            ) from error
        if features.ndim != 2 or not torch.isfinite(features).all():
            raise ConfigError(
                f"{FLAG} {self.folder}: gives {list(features.shape)} numbers for one picture, or some that are not "
                "finite; name another tower, or --dtype float32"
            )
        return int(features.shape[1])


def _projection(folder: Path, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """The weight of the projection behind the pooled output, [D, width of the tower]; None where there is none."""
    tensors = HFFolder(folder)
    if _PROJECTION not in set(tensors.keys()):
        return None
    return tensors.tensor(_PROJECTION).to(device=device, dtype=dtype)
