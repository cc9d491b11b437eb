"""Configuration of a VILA-U tower for transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig


class VILAUTowerConfig(PretrainedConfig):
    """`config.json` of the folder of a tower that is exported for transformers.

    Args:
        hidden_size: C, width of the encoder and of the features that are quantised.
        intermediate_size: inner width of the encoder's MLP.
        num_hidden_layers: encoder layers that codes use: those of the SigLIP but its last.
        num_attention_heads: of each encoder layer.
        image_size: S, side in pixels of the pictures that are read.
        patch_size: side in pixels of a patch.
        hidden_act: activation of the encoder's MLP.
        layer_norm_eps: of the encoder's norms.
        latent_shape: features of a picture: rows H, columns W, width C.
        code_shape: codes of a picture: rows h, columns w, depth D.
        codebook_sizes: K of each depth.
        shared_codebook: one codebook for all depths.
        decoder_latent_shape: the grid that features are resized to for the pixel decoder; None: as they are.
        ddconfig: sizes of the pixel decoder, by the published names.
    """

    model_type = "megatron_vila_u_tower"

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 23,
        num_attention_heads: int = 16,
        image_size: int = 256,
        patch_size: int = 16,
        hidden_act: str = "gelu_pytorch_tanh",
        layer_norm_eps: float = 1e-6,
        latent_shape: Sequence[int] = (16, 16, 1024),
        code_shape: Sequence[int] = (16, 16, 4),
        codebook_sizes: Sequence[int] = (16384, 16384, 16384, 16384),
        shared_codebook: bool = True,
        decoder_latent_shape: Sequence[int] | None = None,
        ddconfig: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.image_size, self.patch_size = image_size, patch_size
        self.hidden_act, self.layer_norm_eps = hidden_act, layer_norm_eps
        self.latent_shape, self.code_shape = list(latent_shape), list(code_shape)
        self.codebook_sizes, self.shared_codebook = list(codebook_sizes), shared_codebook
        self.decoder_latent_shape = None if decoder_latent_shape is None else list(decoder_latent_shape)
        self.ddconfig = ddconfig or {
            "ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "z_channels": 256,
            "resolution": 256, "out_ch": 3,
        }  # fmt: skip
        super().__init__(**kwargs)
