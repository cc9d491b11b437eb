"""Make a toy vision tower of VILA-U in the published layout, with random weights: a folder `vision_tower`.

It has the sizes that `--preset vila_u_tiny` expects: pictures of 64 pixels become 4 x 4 positions of 4 codes. Its
SigLIP and its pixel decoder are random, and its codebook holds features of random pictures, so that codes tell pictures
apart; pictures that are made of codes show nothing that a person would recognise.

    python examples/vila_u_tiny/random_tower.py vision_tower
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eve.models.vila_u.config import PRESETS, VILAUConfig
from megatron_eve.models.vila_u.tower_folder import read_tower_folder
from megatron_eve.models.vila_u.tower_names import published_name
from megatron_eve.runtime.command_line import command_parser_of

if TYPE_CHECKING:
    import torch

    from megatron_eve.models.vila_u.quantizer import Quantizer

PRESET = "vila_u_tiny"
SIDE = 64
"""Of a picture, in pixels."""
SIGLIP = "siglip-tiny"
"""Folder in the tower's, with the sizes of its SigLIP."""
_RANDOM_PICTURES, _BLOBS = 256, 5


def save_toy_tower(folder: Path, seed: int = 0, mixing: float = 1.0) -> Path:
    """Save a tower with seeded weights and the sizes of the preset in the published layout; returns the new folder.

    Args:
        folder: new.
        seed: of the weights.
        mixing: factor on what each layer of the SigLIP adds to its input; with a small one the codes of a position tell
            mostly of its own patch.
    """
    import torch
    from safetensors.torch import save_file

    from megatron_eve.models.vila_u.tower import UnifiedTower

    vision: VILAUConfig = PRESETS[PRESET].vision
    (folder / SIGLIP).mkdir(parents=True)
    for path, fields in ((folder, _sizes(vision)), (folder / SIGLIP, _siglip_sizes(vision))):
        (path / "config.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tower = UnifiedTower(read_tower_folder(folder))
        coarse = torch.rand(_RANDOM_PICTURES, 3, _BLOBS, _BLOBS)
        pixels = torch.nn.functional.interpolate(coarse, SIDE, mode="bilinear").mul(255).byte()
        with torch.no_grad():
            for name, weight in tower.encoder.named_parameters():
                if name.endswith(("out_proj.weight", "fc2.weight")):
                    weight.mul_(mixing)
            fill_codebook(tower.quantizer, tower.features(pixels.permute(0, 2, 3, 1)))
    tensors = {published_name(name): tensor.clone() for name, tensor in tower.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def fill_codebook(quantizer: Quantizer, features: torch.Tensor) -> None:
    """Fill a shared codebook with K / D features, K / D of what these leave of all features, and so on.

    Args:
        quantizer: with one codebook of K vectors for D depths, D a divisor of K.
        features: float32 [n, H, W, C] of pictures; more of them than K.
    """
    import torch

    from megatron_eve.models.vila_u.quantizer import Codebook

    codebook, left = quantizer.codebooks[0], quantizer.fold(features).flatten(0, -2)
    assert isinstance(codebook, Codebook)
    picked: list[torch.Tensor] = []
    for _ in range(quantizer.depth):
        left = left[left.norm(dim=1) > 1e-4]  # those that were picked leave nothing
        some = left[torch.randperm(len(left))[: len(codebook.weight[:-1]) // quantizer.depth]]
        left = left - some[torch.cdist(left, some).argmin(1)]
        picked.append(some)
    codebook.weight[:-1] = torch.cat(picked)
    codebook.embed_ema.copy_(codebook.weight[:-1])
    codebook.cluster_size_ema.fill_(1.0)


def _sizes(vision: VILAUConfig) -> dict[str, Any]:
    """config.json of the tower."""
    grid, width = vision.code_grid, vision.code_vector_size
    return {
        "model_type": "rqvaesigliptransformer_model",
        "hidden_size": width,
        "rqvaesiglip": {
            "model_type": "rqvaesiglip_model",
            "pretrained_model": SIGLIP,
            "embed_dim": width,
            "n_embed": vision.visual_codebook_size,
            "latent_shape": [grid, grid, width],
            "code_shape": [grid, grid, vision.codes_per_position],
            "shared_codebook": not vision.separate_codebooks,
            "decoder_latent_shape": None,
            "decay": 0.99,
            "latent_loss_weight": 0.25,
            "restart_unused_codes": True,
            "ddconfig": {
                "ch": 32,
                "ch_mult": [1, 1, 1, 1, 2],
                "num_res_blocks": 1,
                "attn_resolutions": [grid],
                "z_channels": width,
                "resolution": SIDE,
                "out_ch": 3,
                "in_channels": 3,
                "double_z": False,
                "dropout": 0.0,
            },
        },
    }


def _siglip_sizes(vision: VILAUConfig) -> dict[str, Any]:
    """config.json of its SigLIP, of which the vision side is read."""
    sides = {
        "model_type": "siglip_vision_model",
        "hidden_size": vision.code_vector_size,
        "intermediate_size": 2 * vision.code_vector_size,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": SIDE // vision.code_grid,
    }
    return {"model_type": "siglip", "vision_config": sides}


def main() -> None:
    """Read the command line and save."""
    parser = command_parser_of(__doc__)
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="new folder for config.json and model.safetensors"
    )
    print(f"-> {save_toy_tower(parser.parse_args().folder)}")


if __name__ == "__main__":
    main()
