"""FLOPs of a step of the tower's training, of one pair (see `training/monitoring/flops.py` for what is counted).

Counted are matrix products and convolutions. The products of all pictures with all texts, which grow with the batch,
the norms and the update of the codebooks are left out. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_eve.models.flops import FORWARD, FROM_PIXELS, FROZEN, TRAINED, attention, matrix
from megatron_eve.models.vila_u.tower_config import TEXT_DEFAULTS, TowerConfig, siglip_fields, tower_settings
from megatron_eve.models.vila_u.tower_parameters import VGG_LEVELS
from megatron_eve.models.vila_u.tower_settings import DecoderSizes, EncoderSizes


def pair_flops(vision: TowerConfig, iteration: int) -> float:
    """FLOPs of one pair, forward and backward.

    Args:
        vision: sizes, and which losses there are.
        iteration: iterations before the step: the adversarial loss may begin later.

    Raises:
        ConfigError: `--vision-tower` cannot be read.
    """
    return float(sum(parts_of_pair(vision, iteration).values()))


def parts_of_pair(vision: TowerConfig, iteration: int) -> dict[str, int]:
    """The same by part."""
    tower = tower_settings(vision)
    encoder, layer = tower.encoder, encoder_layer(tower.encoder)
    positions = tower.latent_shape[0] ** 2
    patches = positions * matrix(3 * encoder.patch_size**2, encoder.hidden_size)
    code_rows, code_columns, depth = tower.code_shape
    vector = positions * encoder.hidden_size // (code_rows * code_columns)
    reconstructs = bool(vision.reconstruction_weight)
    found = {
        "encoder": FROM_PIXELS * patches + TRAINED * (encoder.num_layers - 1) * layer,
        "quantiser": depth * code_rows * code_columns * matrix(vector, vision.visual_codebook_size),
        "pixel decoder": (TRAINED if reconstructs else FORWARD)
        * (
            (tower.decoder_latent_shape or tower.latent_shape)[0] ** 2
            * matrix(encoder.hidden_size, tower.decoder.z_channels)
            + decoder_forward(tower.decoder)
        ),
    }
    if vision.contrastive_weight:
        found["contrast"] = TRAINED * (layer + pooling_forward(encoder)) + text_forward(vision)
    if reconstructs and vision.perceptual_weight:
        # Two pictures forward, and the gradient of one.
        found["perceptual loss"] = (FORWARD + FROZEN) * perceptual_forward(tower.picture_size)
    if reconstructs and vision.adversarial_weight and iteration >= vision.gan_start:
        last = tower.picture_size**2 * matrix(9 * tower.decoder.ch * tower.decoder.ch_mult[0], 3)
        # What it says of reconstructions, with the gradient of these; then both kinds of pictures in its own step. The
        # adaptive weight takes the gradient of the last convolution twice.
        passes = FROZEN + 2 * TRAINED
        found["discriminator"] = passes * discriminator_forward(tower.picture_size) + 2 * last
    return found


def encoder_layer(encoder: EncoderSizes) -> int:
    """A layer of the encoder, of one picture, forward."""
    positions, width = (encoder.image_size // encoder.patch_size) ** 2, encoder.hidden_size
    return _layer(positions, width, encoder.ffn_hidden_size)


def pooling_forward(encoder: EncoderSizes) -> int:
    """Attention pooling of one picture: one query, and an MLP behind it."""
    positions, width = (encoder.image_size // encoder.patch_size) ** 2, encoder.hidden_size
    keys = 2 * positions * matrix(width, width)
    return (
        keys
        + 2 * matrix(width, width)
        + attention(positions, width)
        + _mlp(1, width, encoder.ffn_hidden_size)
    )


def text_forward(vision: TowerConfig) -> int:
    """The text side, of one text; it is frozen."""
    fields = siglip_fields(vision).get("text_config")
    sizes = {**TEXT_DEFAULTS, **(fields if isinstance(fields, dict) else {})}
    width, length = sizes["hidden_size"], sizes["max_position_embeddings"]
    layers = sizes["num_hidden_layers"] * _layer(length, width, sizes["intermediate_size"])
    return layers + matrix(width, sizes.get("projection_size") or width)


def decoder_forward(decoder: DecoderSizes) -> int:
    """The pixel decoder, of one picture, without the convolution in front of it."""
    return sum(_decoder_parts(decoder))


def _decoder_parts(decoder: DecoderSizes) -> Iterator[int]:
    side, channels = decoder.grid, decoder.ch * decoder.ch_mult[-1]
    yield _convolution(side, decoder.z_channels, channels)
    yield 2 * _block(side, channels, channels) + _attention(side, channels)
    for level in reversed(range(len(decoder.ch_mult))):
        out = decoder.ch * decoder.ch_mult[level]
        for _ in range(decoder.num_res_blocks + 1):
            yield _block(side, channels, out)
            channels = out
            if side in decoder.attn_resolutions:
                yield _attention(side, channels)
        if level:
            side *= 2
            yield _convolution(side, channels, channels)
    yield _convolution(side, channels, decoder.out_ch)


def perceptual_forward(size: int) -> int:
    """The network of the perceptual loss, of one picture of this side."""
    total, channels = 0, 3
    for level, (convolutions, out) in enumerate(VGG_LEVELS):
        for _ in range(convolutions):
            total += _convolution(size >> level, channels, out)
            channels = out
    return total


def discriminator_forward(size: int) -> int:
    """The discriminator, of one picture of this side: two strides of 2, then two convolutions that lose a row each."""
    half, quarter = size // 2, size // 4
    return (
        half**2 * matrix(16 * 3, 64)
        + quarter**2 * matrix(16 * 64, 128)
        + (quarter - 1) ** 2 * matrix(16 * 128, 256)
        + (quarter - 2) ** 2 * matrix(16 * 256, 1)
    )


def _layer(rows: int, width: int, inner: int) -> int:
    return 4 * rows * matrix(width, width) + _mlp(rows, width, inner) + attention(rows**2, width)


def _mlp(rows: int, width: int, inner: int) -> int:
    return 2 * rows * matrix(width, inner)


def _convolution(side: int, channels: int, out: int, kernel: int = 3) -> int:
    return side**2 * matrix(kernel**2 * channels, out)


def _block(side: int, channels: int, out: int) -> int:
    shortcut = _convolution(side, channels, out, 1) if channels != out else 0
    return _convolution(side, channels, out) + _convolution(side, out, out) + shortcut


def _attention(side: int, channels: int) -> int:
    return 4 * _convolution(side, channels, channels, 1) + attention(side**4, channels)
