"""What a checkpoint of a run that trains a tower says of it: the JSON files that a published folder of it would have.

With it `tower_folder.read_tower_folder` reads the checkpoint as it reads an imported one. Imports no torch.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_eve.models.vila_u.tower_config import TowerConfig, tower_settings
from megatron_eve.models.vila_u.tower_folder import CONFIG, SECTION, TOWER_TYPE, TowerRecord


def record_of_run(vision: TowerConfig) -> dict[str, Any]:
    """`{"tower": TowerRecord as a dictionary}`, of plain values that YAML can write.

    Raises:
        ConfigError: `--vision-tower` cannot be read.
    """
    tower = tower_settings(vision)
    decoder = tower.decoder
    assert vision.vision_tower is not None
    section = {
        "model_type": "rqvaesiglip_model",
        "architectures": ["RQVAESiglipModel"],
        "pretrained_model": Path(vision.vision_tower).name,
        "embed_dim": tower.latent_shape[2],
        "n_embed": vision.visual_codebook_size,
        "latent_shape": list(tower.latent_shape),
        "code_shape": list(tower.code_shape),
        "shared_codebook": tower.shared_codebook,
        "decoder_latent_shape": None
        if tower.decoder_latent_shape is None
        else list(tower.decoder_latent_shape),
        "decay": 0.99,
        "latent_loss_weight": vision.commitment_weight,
        "restart_unused_codes": True,
        "ddconfig": {
            "ch": decoder.ch,
            "ch_mult": list(decoder.ch_mult),
            "num_res_blocks": decoder.num_res_blocks,
            "attn_resolutions": list(decoder.attn_resolutions),
            "z_channels": decoder.z_channels,
            "resolution": decoder.resolution,
            "out_ch": decoder.out_ch,
            "in_channels": 3,
            "double_z": False,
            "dropout": 0.0,
        },
    }
    config = {
        "model_type": TOWER_TYPE,
        "architectures": ["RQVAESIGLIPTransformer"],
        "hidden_size": tower.latent_shape[2],
        SECTION: section,
        "torch_dtype": "float32",
    }
    return {"tower": asdict(TowerRecord({CONFIG: config}, asdict(tower.encoder)))}
