"""What stands beside the weights in the folder of a tower for transformers. Imports no torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_eve.models.towers.normalisation import NORMALISATION
from megatron_eve.models.vila_u.tower_folder import TowerSettings

TOWER_CODE = ("configuration_vila_u_tower.py", "modeling_vila_u_tower.py", "image_processing_vila_u.py")


def write_transformers_tower(folder: Path, tower: TowerSettings, dtype: str) -> None:
    """Write configuration, preprocessing and code.

    Args:
        folder: an existing one.
        tower: its sizes.
        dtype: of the weights, such as "bfloat16".
    """
    config = {
        "architectures": ["VILAUTowerModel"],
        "auto_map": {
            "AutoConfig": "configuration_vila_u_tower.VILAUTowerConfig",
            "AutoModel": "modeling_vila_u_tower.VILAUTowerModel",
        },
        **tower_config(tower),
        "torch_dtype": dtype,
    }
    processor = image_processor_config(tower)
    for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in TOWER_CODE:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)


def tower_config(tower: TowerSettings) -> dict[str, Any]:
    """Sizes of a tower, as config.json has them (`VILAUTowerConfig`)."""
    encoder = tower.encoder
    return {
        "model_type": "megatron_vila_u_tower",
        "hidden_size": encoder.hidden_size,
        "intermediate_size": encoder.ffn_hidden_size,
        "num_hidden_layers": encoder.num_layers - 1,
        "num_attention_heads": encoder.num_attention_heads,
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "hidden_act": encoder.hidden_act,
        "layer_norm_eps": encoder.norm_epsilon,
        "latent_shape": tower.latent_shape,
        "code_shape": tower.code_shape,
        "codebook_sizes": tower.codebook_sizes,
        "shared_codebook": tower.shared_codebook,
        "decoder_latent_shape": tower.decoder_latent_shape,
        "ddconfig": asdict(tower.decoder),
    }


def image_processor_config(tower: TowerSettings) -> dict[str, Any]:
    """preprocessor_config.json of a tower."""
    mean, std = NORMALISATION["siglip"]
    return {
        "image_processor_type": "VILAUImageProcessor",
        "auto_map": {"AutoImageProcessor": "image_processing_vila_u.VILAUImageProcessor"},
        "image_size": tower.image_size,
        "image_mean": mean,
        "image_std": std,
    }
