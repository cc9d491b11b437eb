"""Parameters of VILA-U's tower in training, and what is kept beside them, from its sizes alone. Imports no torch."""

from __future__ import annotations

from megatron_eve.models.family import PartCounts
from megatron_eve.models.towers.tower_training import PERCEPTUAL_LEVELS
from megatron_eve.models.vila_u.tower_config import (
    RANDOM,
    TEXT_DEFAULTS,
    TowerConfig,
    perceptual,
    siglip_fields,
    tower_settings,
)
from megatron_eve.models.vila_u.tower_settings import DecoderSizes

VGG_LEVELS = tuple((convolutions, 64 * multiple) for convolutions, multiple in PERCEPTUAL_LEVELS)
"""Of VGG-16: convolutions and channels of each level."""
# Scale and bias of the logits.
_SCALARS = 2
# The discriminator: two convolutions with a bias, at its ends, and two with a norm.
_DISCRIMINATOR = 3 * 64 * 16 + 64 + 64 * 128 * 16 + 2 * 128 + 128 * 256 * 16 + 2 * 256 + 256 * 16 + 1


def parameter_counts(vision: TowerConfig) -> PartCounts:
    """All parameters of a rank, and those that do not train.

    These are the text side or, where pictures are not compared with texts, the whole contrastive side, and, where no
    loss asks for pictures, what makes them.

    Raises:
        ConfigError: `--vision-tower` cannot be read.
    """
    tower, fields = tower_settings(vision), siglip_fields(vision)
    width, inner = tower.encoder.hidden_size, tower.encoder.ffn_hidden_size
    side = tower.latent_shape[0]
    embeddings = (3 * tower.encoder.patch_size**2 + 1) * width + side**2 * width
    encoder = embeddings + (tower.encoder.num_layers - 1) * _layer(width, inner)
    # Its last layer, the norm behind it, attention pooling, and scale and bias of the logits.
    pooling = width + 4 * (width**2 + width) + 2 * width + _mlp(width, inner)
    contrast = _layer(width, inner) + 2 * width + pooling + _SCALARS
    channels = tower.decoder.z_channels
    pictures = (width + 1) * channels + decoder_parameters(tower.decoder)
    text = 0
    if isinstance(fields.get("text_config"), dict):
        sizes = {**TEXT_DEFAULTS, **fields["text_config"]}
        inside, rows = sizes["hidden_size"], sizes["vocab_size"] + sizes["max_position_embeddings"]
        out = sizes.get("projection_size") or inside
        layers = sizes["num_hidden_layers"] * _layer(inside, sizes["intermediate_size"])
        text = rows * inside + layers + 2 * inside + (inside + 1) * out
    reconstructs, compares = bool(vision.reconstruction_weight), bool(vision.contrastive_weight)
    discriminator = _DISCRIMINATOR if reconstructs and vision.adversarial_weight else 0
    return PartCounts(
        encoder + contrast + pictures + text + discriminator,
        0,
        frozen=text + (not compares) * contrast + (not reconstructs) * pictures,
        float32=discriminator + _SCALARS * compares,
    )


def float32_bytes(vision: TowerConfig) -> int:
    """Bytes of codebooks with their running sums, and of the network of the perceptual loss.

    Raises:
        ConfigError: `--vision-tower` cannot be read.
    """
    tower = tower_settings(vision)
    (rows, columns, width), (code_rows, code_columns, depth) = tower.latent_shape, tower.code_shape
    vector = (rows // code_rows) * (columns // code_columns) * width
    size, books = vision.visual_codebook_size, depth if vision.separate_codebooks else 1
    codebooks = books * ((2 * size + 1) * vector + size)
    # Random features are small, and not counted.
    used = perceptual(vision) and vision.perceptual_weights not in (None, RANDOM)
    return 4 * (codebooks + (_perceptual_parameters() if used else 0))


def _perceptual_parameters() -> int:
    """Convolutions of VGG-16, and one weight for each channel that is looked at."""
    total, channels = 0, 3
    for convolutions, out in VGG_LEVELS:
        for _ in range(convolutions):
            total += _convolution(channels, out)
            channels = out
        total += out
    return total


def decoder_parameters(decoder: DecoderSizes) -> int:
    """Parameters of the pixel decoder, without the convolution in front of it."""
    channels, total = decoder.ch * decoder.ch_mult[-1], 0
    total += _convolution(decoder.z_channels, channels)
    total += 2 * _block(channels, channels) + _attention(channels)
    side = decoder.grid
    for level in reversed(range(len(decoder.ch_mult))):
        out = decoder.ch * decoder.ch_mult[level]
        for _ in range(decoder.num_res_blocks + 1):
            total += _block(channels, out)
            channels = out
            if side in decoder.attn_resolutions:
                total += _attention(channels)
        if level:
            total += _convolution(channels, channels)
            side *= 2
    return total + 2 * channels + _convolution(channels, decoder.out_ch)


def _layer(width: int, inner: int) -> int:
    """A layer of a transformer with biases: attention, MLP and two norms."""
    return 4 * (width**2 + width) + _mlp(width, inner) + 4 * width


def _mlp(width: int, inner: int) -> int:
    return 2 * width * inner + inner + width


def _convolution(channels: int, out: int, side: int = 3) -> int:
    return channels * out * side**2 + out


def _block(channels: int, out: int) -> int:
    shortcut = _convolution(channels, out, 1) if channels != out else 0
    return 2 * channels + _convolution(channels, out) + 2 * out + _convolution(out, out) + shortcut


def _attention(channels: int) -> int:
    return 2 * channels + 4 * _convolution(channels, channels, 1)
