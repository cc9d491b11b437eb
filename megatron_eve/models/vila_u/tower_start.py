"""The weights that a run of VILA-U's tower starts from: of a SigLIP, beside random codebooks and pixel decoder, or of a
tower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.schema import RunConfig
from megatron_eve.models.hf_folder import HFFolder
from megatron_eve.models.towers.perceptual import PerceptualLoss, load_perceptual, random_perceptual
from megatron_eve.models.vila_u.tower_config import (
    RANDOM,
    TowerConfig,
    perceptual,
    siglip_fields,
    tower_settings,
)
from megatron_eve.models.vila_u.tower_folder import read_tower_folder
from megatron_eve.models.vila_u.tower_names import published_name, stored_name
from megatron_eve.models.vila_u.tower_settings import TowerSettings
from megatron_eve.models.vila_u.tower_weights import TowerWeights
from megatron_eve.models.vila_u.trainable_tower import VILAUTrainableTower

# Parts of the tower in training that a SigLIP has, and what transformers calls them.
_SIGLIP = {"encoder.": "vision_model.", "text.": "text_model."}
_SCALARS = ("logit_scale", "logit_bias")


def start_tower(config: RunConfig, pretrained: Path | None) -> VILAUTrainableTower:
    """The tower of a run with the weights that it starts from; see `TowerFamily.tower`.

    Raises:
        ConfigError: weights that are missing, damaged or of other sizes.
    """
    vision: TowerConfig = config.vision
    assert vision.vision_tower is not None
    compares = bool(vision.contrastive_weight)
    tower = VILAUTrainableTower(
        tower_settings(vision),
        text_fields(siglip_fields(vision)),
        contrast=compares,
        reconstruct=bool(vision.reconstruction_weight),
        bf16=config.training.bf16,
        seed=config.training.seed,
    )
    siglip = Path(vision.vision_tower)
    load_siglip(tower, siglip, "--vision-tower")
    if pretrained is not None:
        load_tower(tower, read_tower_folder(pretrained, siglip), compares, "--pretrained-checkpoint")
    return tower


def perceptual_loss(config: RunConfig) -> PerceptualLoss | None:
    """The network of the perceptual loss; see `TowerFamily.perceptual`.

    Raises:
        ConfigError: weights that are missing, damaged or of another network.
    """
    vision: TowerConfig = config.vision
    if not perceptual(vision):
        return None
    if vision.perceptual_weights == RANDOM:
        return random_perceptual(config.training.seed)
    assert vision.perceptual_weights is not None
    linear = None if vision.perceptual_linear is None else Path(vision.perceptual_linear)
    return load_perceptual(Path(vision.perceptual_weights), linear)


def load_siglip(tower: VILAUTrainableTower, folder: Path, flag: str) -> None:
    """Take encoder, text side and scale and bias of the logits from a SigLIP in Hugging Face layout.

    Raises:
        ConfigError: a tensor that is missing, damaged or of another shape.
    """
    weights = HFFolder(folder)
    keys = set(weights.keys())
    for name, tensor in tower.state_dict().items():
        part = next((part for part in _SIGLIP if name.startswith(part)), None)
        if part is None and name not in _SCALARS:
            continue
        key = name if part is None else _SIGLIP[part] + name.removeprefix(part)
        if part is None and key not in keys and not tower.has_texts:
            continue
        if key not in keys:
            raise ConfigError(
                f"{flag} {folder}: the weights lack {key}; name a whole SigLIP, with both of its sides"
            )
        _copy(
            tensor, weights.describe(key)[0], lambda key=key: weights.tensor(key), f"{flag} {folder}: {key}"
        )


def load_tower(tower: VILAUTrainableTower, settings: TowerSettings, contrast: bool, flag: str) -> None:
    """Take the weights of a published folder, or of a checkpoint, of a tower of the same sizes.

    Args:
        tower: whose weights are replaced.
        settings: what `read_tower_folder` says of the folder.
        contrast: pictures will be compared with texts.
        flag: that names the folder.

    Raises:
        ConfigError: a tensor that is missing, damaged or of another shape; no text side where texts are needed.
    """
    weights = TowerWeights(settings)
    for name, tensor in tower.state_dict().items():
        key = stored_name(published_name(name), settings)
        assert key is not None
        if key not in weights and name.startswith(("text.", *_SCALARS)):
            if contrast:
                raise ConfigError(
                    f"{flag} {settings.folder}: the weights lack {key}, and pictures are compared with texts; name a "
                    "tower with its text side, or use --contrastive-weight 0"
                )
            continue
        if key not in weights:
            raise ConfigError(f"{flag} {settings.folder}: the weights lack {key}; copy the folder again")
        _copy(
            tensor,
            weights.shape(key),
            lambda key=key: weights.tensor(key),
            f"{flag} {settings.folder}: {key}",
        )


def _copy(tensor: torch.Tensor, shape: torch.Size, read: Any, named: str) -> None:
    if tuple(shape) != tuple(tensor.shape):
        raise ConfigError(
            f"{named} is {list(shape)} in the weights, and {list(tensor.shape)} by its settings; copy both from the "
            "same model"
        )
    with torch.no_grad():
        tensor.copy_(read())


def text_fields(siglip: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`text_config` of a SigLIP's config.json; None where it has none."""
    found = siglip.get("text_config")
    return found if isinstance(found, dict) else None
