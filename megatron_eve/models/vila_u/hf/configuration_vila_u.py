"""Configuration of VILA-U for transformers: Llama's fields, those of the tower, and of the depth transformer."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class VILAUConfig(LlamaConfig):
    """`config.json` of the folder of a VILA-U that is exported for transformers.

    Attributes:
        vision_config: of the tower (`VILAUTowerConfig`), which turns pictures into codes and codes into pictures.
        depth_config: sizes of the depth transformer by their published names: `embed_dim`, `head.n_layer`,
            `head.block.n_head` and `vocab_size`, the codes that it tells apart.
        image_token_index: stands for one position of a picture in `input_ids`; it has no embedding.
        visual_loss_weight: of the loss of codes beside that of tokens.
    """

    model_type = "megatron_vila_u"

    vision_config: dict[str, Any] | None = None
    depth_config: dict[str, Any] | None = None
    image_token_index: int | None = None
    visual_loss_weight: float = 1.0
