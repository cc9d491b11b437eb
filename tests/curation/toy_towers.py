"""Tiny vision towers in Hugging Face layout: with random weights, or with a projection that was fitted to photos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from megatron_eve.curation.image_tower import ImageTower
from megatron_eve.data.images.backends import open_decoder
from megatron_eve.data.images.interface import DecodeSettings, ImageTask
from tests.curation.photo_kinds import KINDS, variant

SIDE = 64
_FITTED_VARIANTS = range(1000, 1030)  # of each kind; tests have others
_SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 9,
}


def vision_sizes() -> dict[str, Any]:
    """Two layers of width 128 on 8 x 8 patches."""
    return {**_SIZES, "image_size": SIDE, "patch_size": 8}


def clip_model(width: int, seed: int = 0) -> transformers.CLIPModel:
    """A CLIP with random weights and a projection to `width` numbers."""
    torch.manual_seed(seed)
    config = transformers.CLIPConfig(text_config=_TEXT, vision_config=vision_sizes(), projection_dim=width)
    return transformers.CLIPModel(config).eval()


def save_tower(folder: Path, model: Any, **fields: Any) -> Path:
    """Write a tower with a preprocessor_config.json: by default the middle square, from -1 to 1."""
    model.save_pretrained(folder)
    settings: dict[str, Any] = {
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_center_crop": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        **fields,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def random_tower(folder: Path, seed: int = 0) -> Path:
    """A CLIP with random weights, without a text tower or a projection."""
    return save_tower(folder, clip_model(20, seed).vision_model)


def fitted_tower(folder: Path) -> Path:
    """A CLIP with random layers, whose projection was fitted (ridge regression) to name the kinds of other variants."""
    model = clip_model(len(KINDS))
    files = [variant(kind, number) for kind in KINDS for number in _FITTED_VARIANTS]
    tower = open_tower(random_tower(folder / "random"))
    pooled = tower.tower(pixel_values=_pixels(files, tower)).pooler_output.double().numpy()
    named = np.eye(len(KINDS)).repeat(len(_FITTED_VARIANTS), axis=0)
    ridge = 0.01 * np.eye(pooled.shape[1])
    weights = np.linalg.solve(pooled.T @ pooled + ridge, pooled.T @ named)
    model.visual_projection.weight.data = torch.from_numpy(weights.T.astype(np.float32)).contiguous()
    return save_tower(folder / "fitted", model)


def open_tower(folder: Path) -> ImageTower:
    """The tower of a folder in float32 on the CPU."""
    return ImageTower(folder, trust_remote_code=False, dtype=torch.float32, device=torch.device("cpu"))


def views(files: list[bytes], tower: ImageTower, backend: Any = "threads") -> torch.Tensor:
    """What the tower is given of image files: uint8 [files, V, V, 3]."""
    decoder = open_decoder(backend, DecodeSettings(True, 1 << 24), threads=1, gpu=None)
    found = decoder.prepare([ImageTask(file, {"tower": tower.preprocessing.view}) for file in files])
    decoder.close()
    return torch.stack([one["tower"] for one in found])  # type: ignore[index]


def _pixels(files: list[bytes], tower: ImageTower) -> torch.Tensor:
    return (views(files, tower).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
