"""Small towers with random weights, written in the published layout."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SIGLIP: dict[str, Any] = {
    "model_type": "siglip",
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
    },
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "model_type": "rqvaesigliptransformer_model",
    "hidden_size": 32,
    "rqvaesiglip": {
        "model_type": "rqvaesiglip_model", "pretrained_model": "someone/siglip-tiny", "embed_dim": 32, "n_embed": 64,
        "latent_shape": [4, 4, 32], "code_shape": [4, 4, 4], "shared_codebook": True, "decoder_latent_shape": None,
        "decay": 0.99, "latent_loss_weight": 0.25, "restart_unused_codes": True,
        "ddconfig": {
            "ch": 32, "ch_mult": [1, 1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [4], "z_channels": 32,
            "resolution": 32, "out_ch": 3, "in_channels": 3, "double_z": False, "dropout": 0.0,
        },
    },
}  # fmt: skip


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of CONFIG or of one like it with other values in `rqvaesiglip`; those of `ddconfig` by their own names."""
    found = copy.deepcopy(config)
    section = found["rqvaesiglip"]
    for name, value in changes.items():
        if name == "rqtransformer":
            found[name] = value
            continue
        (section["ddconfig"] if name in section["ddconfig"] else section)[name] = value
    return found


def write_sizes(
    folder: Path, config: dict[str, Any] = CONFIG, siglip: dict[str, Any] | None = SIGLIP
) -> Path:
    """config.json of a tower, and of its SigLIP beside it in the folder that `pretrained_model` ends in."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if siglip is not None:
        beside = folder / Path(config["rqvaesiglip"]["pretrained_model"]).name
        beside.mkdir()
        (beside / "config.json").write_text(json.dumps(siglip))
    return folder


def write_tower(
    folder: Path,
    config: dict[str, Any] = CONFIG,
    siglip: dict[str, Any] = SIGLIP,
    seed: int = 0,
    copies: bool = True,
) -> Path:
    """A whole folder.

    Args:
        folder: new.
        config: of the tower.
        siglip: of its SigLIP.
        seed: of the weights.
        copies: write a shared codebook for each depth, as older writers do.
    """
    from megatron_eve.models.vila_u.quantizer import Codebook
    from megatron_eve.models.vila_u.tower import UnifiedTower
    from megatron_eve.models.vila_u.tower_folder import read_tower_folder

    settings = read_tower_folder(write_sizes(folder, config, siglip))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tower = UnifiedTower(settings)
        for codebook in tower.quantizer.codebooks:
            assert isinstance(codebook, Codebook)
            codebook.weight[:-1].normal_()
            codebook.embed_ema.copy_(codebook.weight[:-1])
    tensors = {}
    for name, tensor in tower.state_dict().items():
        if not copies and name.startswith(tuple(f"quantizer.codebooks.{level}." for level in range(1, 9))):
            continue
        place = "siglip_model.vision_model." if name.startswith("encoder.") else ""
        tensors[f"rqvaesiglip.{place}{name.removeprefix('encoder.') if place else name}"] = tensor.clone()
    save_file(tensors, folder / "model.safetensors")
    return folder
