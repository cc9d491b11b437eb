"""VILA-U's tower: a picture becomes codes, and codes become a picture.

The encoder is a SigLIP up to its last layer but one, whose raw output the quantiser reads.

Shapes: n = pictures, S = side of a picture in pixels, H x W x C = features of one, h x w = positions with codes,
D = depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_eve.config.errors import ConfigError
from megatron_eve.models.towers import tower_module
from megatron_eve.models.vila_u.pixel_decoder import PixelDecoder
from megatron_eve.models.vila_u.quantizer import Quantized, Quantizer
from megatron_eve.models.vila_u.tower_folder import TowerSettings

_PREFIX = "rqvaesiglip."
_ENCODER = f"{_PREFIX}siglip_model.vision_model."


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
            float32 [n, S, S, 3], 0 .. 255.
        """
        pixels = self.decode_features(self.quantizer.embed(codes, depth))
        return pixels.float().add(1).mul(127.5).clamp(0, 255).permute(0, 2, 3, 1)

    def decode_features(self, features: torch.Tensor) -> torch.Tensor:
        """Features [n, H, W, C], quantised or not -> pictures [n, 3, S, S], about -1 .. 1."""
        hidden = features.permute(0, 3, 1, 2).to(self.post_quant_conv.weight.dtype)
        if grid := self.settings.decoder_latent_shape:
            hidden = nn.functional.interpolate(hidden.float(), grid, mode="bilinear", align_corners=False)
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
    tower = UnifiedTower(settings)
    wanted = tower.state_dict()
    keys = {name: _published(name) for name in wanted}
    found = _tensors(settings, set(keys.values()))
    _copy_shared(found, settings)
    for name, key in keys.items():
        if key not in found:
            raise ConfigError(f"{settings.folder}: the weights lack {key}; copy the folder again")
        if found[key].shape != wanted[name].shape:
            raise ConfigError(
                f"{settings.folder}: {key} is {list(found[key].shape)} in the weights, and config.json says "
                f"{list(wanted[name].shape)}; copy both from the same model"
            )
    tower.load_state_dict({name: found[key] for name, key in keys.items()})
    return tower.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _published(name: str) -> str:
    """The name in a published folder of a tensor here."""
    if name.startswith("encoder."):
        return _ENCODER + name.removeprefix("encoder.")
    return _PREFIX + name


def _copy_shared(found: dict[str, torch.Tensor], settings: TowerSettings) -> None:
    """Give each depth its codebook where one is shared: newer writers of safetensors leave copies out."""
    if not settings.shared_codebook:
        return
    first = f"{_PREFIX}quantizer.codebooks.0."
    for key in [key for key in found if key.startswith(first)]:
        for level in range(1, settings.depth):
            found.setdefault(f"{_PREFIX}quantizer.codebooks.{level}.{key.removeprefix(first)}", found[key])


def _tensors(settings: TowerSettings, keys: set[str]) -> dict[str, torch.Tensor]:
    """Those of the tensors that the files hold."""
    found: dict[str, torch.Tensor] = {}
    for path in settings.weights:
        found.update((key, tensor) for key, tensor in _file(path) if key in keys)
    return found


def _file(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a file. Of a pickle only tensors are read: no code in it runs."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as tensors:
                yield from ((key, tensors.get_tensor(key)) for key in tensors.keys())  # noqa: SIM118 -- no iterator
        else:
            whole: Mapping[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
            yield from whole.items()
    except Exception as error:  # both raise nearly anything on a file they cannot read
        raise ConfigError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); copy it again"
        ) from None
