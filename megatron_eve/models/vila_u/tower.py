"""VILA-U's tower: a picture becomes codes, and codes become a picture.

The encoder is a SigLIP up to its last layer but one, whose raw output the quantiser reads.

Shapes: n = pictures, S = side of a picture in pixels, P = side of one that is made of codes, H x W x C = features of
one, h x w = positions with codes, D = depth.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_eve.config.errors import ConfigError
from megatron_eve.models.towers import tower_module
from megatron_eve.models.vila_u.pixel_decoder import PixelDecoder
from megatron_eve.models.vila_u.quantizer import Quantized, Quantizer
from megatron_eve.models.vila_u.tower_names import published_name, stored_name
from megatron_eve.models.vila_u.tower_settings import TowerSettings
from megatron_eve.models.vila_u.tower_weights import TowerWeights


class UnifiedTower(nn.Module):
    """The tower with random weights, in float32 on the CPU; `load_tower` gives one with those of a folder.

    Attributes:
        settings: what it is built from.
    """

    def __init__(self, settings: TowerSettings) -> None:
        """Build it."""
        super().__init__()
        self.settings, sizes = settings, settings.encoder
        alone = TransformerConfig(
            num_layers=1, hidden_size=sizes.hidden_size, num_attention_heads=1, use_cpu_initialization=True
        )
        self.encoder = tower_module.VisionTower(
            alone,
            tower_module.TowerSettings(
                model_type="siglip",
                side=sizes.image_size,
                patch_size=sizes.patch_size,
                hidden_size=sizes.hidden_size,
                num_layers=sizes.num_layers,
                num_attention_heads=sizes.num_attention_heads,
                ffn_hidden_size=sizes.ffn_hidden_size,
                hidden_act=sizes.hidden_act,
                norm_epsilon=sizes.norm_epsilon,
                layers_run=sizes.num_layers - 1,
            ),
        )
        self.quantizer = Quantizer(
            settings.latent_shape, settings.code_shape, settings.codebook_sizes, settings.shared_codebook
        )
        self.post_quant_conv = nn.Conv2d(settings.latent_shape[2], settings.decoder.z_channels, 1)
        self.decoder = PixelDecoder(settings.decoder)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features of pictures in front of the quantiser: uint8 [n, S, S, 3] -> [n, H, W, C]."""
        features = self.encoder(pixels)
        return features.view(len(pixels), *self.settings.latent_shape)  # type: ignore[no-any-return]

    def quantize(self, pixels: torch.Tensor) -> Quantized:
        """Codes and quantised features of pictures uint8 [n, S, S, 3]."""
        return self.quantizer(self.features(pixels))  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Codes of pictures.

        Args:
            pixels: uint8 [n, S, S, 3].

        Returns:
            int64 [n, h, w, D], each in 0 .. K - 1.
        """
        return self.quantizer.encode(self.features(pixels))

    @torch.no_grad()
    def decode(self, codes: torch.Tensor, depth: int | None = None) -> torch.Tensor:
        """Pictures of codes.

        Args:
            codes: int64 [n, h, w, D].
            depth: codes of each position that count, from the first; None: all.

        Returns:
            float32 [n, P, P, 3], 0 .. 255.
        """
        pixels = self.decode_features(self.quantizer.embed(codes, depth))
        return pixels.float().add(1).mul(127.5).clamp(0, 255).permute(0, 2, 3, 1)

    def decode_features(self, features: torch.Tensor) -> torch.Tensor:
        """Features [n, H, W, C], quantised or not -> pictures [n, 3, P, P], about -1 .. 1."""
        hidden = features.permute(0, 3, 1, 2).to(self.post_quant_conv.weight.dtype)
        if grid := self.settings.decoder_latent_shape:
            exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            hidden = nn.functional.interpolate(exact, grid, mode="bilinear", align_corners=False)
            hidden = hidden.to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(hidden))  # type: ignore[no-any-return]


def load_tower(settings: TowerSettings, device: torch.device, dtype: torch.dtype) -> UnifiedTower:
    """The tower of a folder, for evaluation: nothing in it trains.

    Args:
        settings: what `read_tower_folder` says of the folder.
        device: that it runs on.
        dtype: of encoder and decoder; the quantiser is always float32.

    Raises:
        ConfigError: weights that are missing, damaged or of other sizes.
    """
    tower, weights = UnifiedTower(settings), TowerWeights(settings)
    wanted = tower.state_dict()
    found = {}
    for name, tensor in wanted.items():
        key = stored_name(published_name(name), settings)
        assert key is not None
        if key in weights and weights.shape(key) != tensor.shape:
            raise ConfigError(
                f"{settings.folder}: {key} is {list(weights.shape(key))} in the weights, and its settings say "
                f"{list(tensor.shape)}; copy both from the same model"
            )
        found[name] = weights.tensor(key)
    tower.load_state_dict(found)
    return tower.to(device=device, dtype=dtype).eval().requires_grad_(False)
