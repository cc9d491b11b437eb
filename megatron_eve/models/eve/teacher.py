"""The frozen vision tower whose patch features the aligning layer imitates: CLIP ViT-L/14-336 as published.

transformers provides the tower, so any that it knows and that gives a patch grid will do (CLIP, SigLIP, DINOv2);
its activation and norms are what the folder's config.json says. It is no part of the model: no gradients, no
optimizer, no place in a checkpoint, which keeps its path and hashes only.

Shapes: i = images, S = side of the square picture in pixels, G = S / patch size, K = width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_eve.config import ConfigError
from megatron_eve.models.eve.config import TEACHER_FLAGS, EVEConfig
from megatron_eve.models.eve.geometry import PATCH_SIZE
from megatron_eve.models.model_parts import Pack
from megatron_eve.models.towers.hf_tower import file_digests, load_tower
from megatron_eve.models.towers.normalisation import CLIP_MEAN, CLIP_STD
from megatron_eve.models.towers.sharing import shared_features


def teacher_fingerprint(folder: str) -> dict[str, Any]:
    """What a checkpoint keeps of the teacher: {"path": folder, "sha256": {file name: hash}}.

    Hashed are the configuration, the weight files that are read, and Python files that may be.

    Raises:
        ConfigError: a file of weights that is something else (a pointer of git-lfs).
    """
    path = Path(folder)
    return {"path": str(path), "sha256": file_digests(path, TEACHER_FLAGS.folder)}


class Teacher:
    """A vision tower on this rank's device, frozen.

    Args:
        vision: names the folder, and the sizes the tower must have.
        dtype: it computes in (bfloat16 in --bf16 runs).
        device: where.

    Raises:
        ConfigError: a folder that cannot be loaded, lacks weights, or holds a tower of another width or grid.
    """

    def __init__(self, vision: EVEConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        assert vision.teacher_model is not None
        self.folder = Path(vision.teacher_model)
        self.patch_size = vision.tower().patch_size
        self.grid = vision.teacher_size // PATCH_SIZE
        self.hidden_state = vision.teacher_hidden_state
        self.width = vision.teacher_hidden_size
        self.dtype = dtype
        tower = load_tower(self.folder, vision.teacher_trust_remote_code, TEACHER_FLAGS.folder)
        self.tower = tower.requires_grad_(False).eval().to(device=device, dtype=dtype)
        self._mean, self._std = (torch.tensor(x, device=device) for x in _normalisation(self.folder))
        self._check()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features of pictures.

        Args:
            images: uint8 [i, S, S, 3]; i may be 0.

        Returns:
            [i, G * G, K], patches row by row, class and register tokens left out.

        Raises:
            ConfigError: the tower's output has no G x G grid, or not as many hidden states.
        """
        if not len(images):
            return torch.zeros(0, self.patches, self.width, dtype=self.dtype, device=images.device)
        pixels = ((images.float() / 255 - self._mean) / self._std).permute(0, 3, 1, 2)
        states = self.tower(pixel_values=pixels.to(self.dtype), output_hidden_states=True).hidden_states
        if not -len(states) <= self.hidden_state < len(states):
            raise ConfigError(
                f"--teacher-hidden-state {self.hidden_state}: the tower in {self.folder} has {len(states)} of them"
            )
        features = states[self.hidden_state]
        others = features.shape[1] - self.grid**2  # class and register tokens stand in front
        if others < 0 or features.shape[2] != self.width:
            raise ConfigError(
                f"--teacher-model {self.folder}: gives {features.shape[1]} tokens of width {features.shape[2]} for a "
                f"picture; {self.grid} x {self.grid} patches (--teacher-size) of width {self.width} "
                "(--teacher-hidden-size) were expected"
            )
        return features[:, others:]

    @property
    def patches(self) -> int:
        """G * G."""
        return self.grid**2

    @property
    def side(self) -> int:
        """S."""
        return self.grid * self.patch_size

    def _check(self) -> None:
        """One grey picture through the tower, so that a wrong one is found before the first step."""
        try:
            self(torch.full((1, self.side, self.side, 3), 127, dtype=torch.uint8, device=self._mean.device))
        except ConfigError:
            raise
        except (
            Exception
        ) as error:  # whatever a tower raises on a picture of another size than it was made for
            raise ConfigError(
                f"--teacher-model {self.folder}: does not take pictures of {self.side} x {self.side} pixels, which "
                f"--teacher-size {self.grid * PATCH_SIZE} asks for ({type(error).__name__}: {error})"
            ) from error


class TeacherTargets:
    """The teacher's features of a pack; see `model_parts.TargetModel`."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def __call__(self, pack: Pack) -> torch.Tensor:
        """[I * G * G, K], image after image; collective over the ranks that share the pack, unless it has no image.

        Args:
            pack: with this rank's share of the pictures in its pixels, as the view "teacher".
        """
        return shared_features(self.teacher, pack.pixels["teacher"], len(pack.image_grids))


def _normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each colour, from preprocessor_config.json or else CLIP's."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return CLIP_MEAN, CLIP_STD
    fields = json.loads(path.read_text(encoding="utf-8"))
    return tuple(fields.get("image_mean", CLIP_MEAN)), tuple(fields.get("image_std", CLIP_STD))
