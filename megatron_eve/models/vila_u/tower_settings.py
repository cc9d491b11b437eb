"""What a VILA-U tower is built from: its settings, and what is wrong with them. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Channels of the pixel decoder are normalised in so many groups.
GROUPS = 32
# Of the SigLIP's MLP, as transformers calls them.
_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")


@dataclass(frozen=True)
class EncoderSizes:
    """The SigLIP of a tower.

    Attributes:
        hidden_size: C.
        ffn_hidden_size: inner width of its MLP.
        num_layers: encoder layers, the last of which codes do not use.
        num_attention_heads: of each layer.
        image_size: side in pixels of its pictures.
        patch_size: side of a patch in pixels.
        hidden_act: activation of the MLP, as transformers calls it.
        norm_epsilon: of the norms.
    """

    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    norm_epsilon: float


@dataclass(frozen=True)
class DecoderSizes:
    """The pixel decoder of a tower, by the names of `ddconfig`.

    Attributes:
        ch: channels that the multipliers multiply.
        ch_mult: multiplier of each level, the level of whole pixels first; each further one is half as fine.
        num_res_blocks: residual blocks of a level, less one.
        attn_resolutions: sides in pixels of the levels with attention.
        z_channels: channels of the input.
        resolution: side of the picture.
        out_ch: channels of the picture.
    """

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    z_channels: int
    resolution: int
    out_ch: int

    @property
    def grid(self) -> int:
        """Side of the grid of features that gives a picture of this resolution."""
        return self.resolution // 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class TowerSettings:
    """A tower that turns pictures into codes, and codes into pictures.

    Attributes:
        folder: where its weights are.
        encoder: its SigLIP.
        decoder: its pixel decoder.
        latent_shape: features of a picture: rows, columns, width.
        code_shape: codes of a picture: rows, columns, depth.
        codebook_sizes: K of each depth.
        shared_codebook: one codebook for all depths.
        decoder_latent_shape: the grid that features are resized to for the decoder, where it is another.
    """

    folder: Path
    encoder: EncoderSizes
    decoder: DecoderSizes
    latent_shape: tuple[int, int, int]
    code_shape: tuple[int, int, int]
    codebook_sizes: tuple[int, ...]
    shared_codebook: bool
    decoder_latent_shape: tuple[int, int] | None

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures that it reads."""
        return self.encoder.image_size

    @property
    def picture_size(self) -> int:
        """Side in pixels of the pictures that it makes of codes."""
        return self.decoder.resolution

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the codes of a picture."""
        return self.code_shape[:2]

    @property
    def depth(self) -> int:
        """Codes of each position."""
        return self.code_shape[2]

    @property
    def codebook_size(self) -> int:
        """The largest K of the depths."""
        return max(self.codebook_sizes)


def size_problems(tower: TowerSettings, siglip_flag: str) -> Iterator[str]:
    """Sizes that do not fit each other, or that no tower can be built of: a sentence each.

    Args:
        tower: as its folder says.
        siglip_flag: that names the config.json of its SigLIP.
    """
    yield from _encoder_problems(tower.encoder, siglip_flag)
    yield from _decoder_problems(tower.decoder)
    (rows, columns, width), (code_rows, code_columns, depth) = tower.latent_shape, tower.code_shape
    side = tower.encoder.image_size // tower.encoder.patch_size
    if (rows, columns, width) != (side, side, tower.encoder.hidden_size):
        yield (
            f"latent_shape is {list(tower.latent_shape)}, and its SigLIP gives {side} x {side} features of the width "
            f"{tower.encoder.hidden_size}; name the config.json of its own SigLIP with {siglip_flag}"
        )
    if rows % code_rows or columns % code_columns:
        yield (
            f"code_shape is {list(tower.code_shape)}, whose grid does not divide latent_shape "
            f"{list(tower.latent_shape)}"
        )
    if (
        any(type(size) is not int or size < 1 for size in tower.codebook_sizes)
        or len(tower.codebook_sizes) != depth
    ):
        yield f"n_embed is {list(tower.codebook_sizes)}, and {depth} sizes above 0 are needed"
    elif tower.shared_codebook and len(set(tower.codebook_sizes)) > 1:
        yield f"n_embed is {list(tower.codebook_sizes)} with shared_codebook, which needs one size"
    grid = tower.decoder_latent_shape or (rows, columns)
    if grid != (tower.decoder.grid, tower.decoder.grid):
        yield (
            f"its decoder makes a picture of {tower.decoder.resolution} pixels from {tower.decoder.grid} x "
            f"{tower.decoder.grid} features, and gets {grid[0]} x {grid[1]}; correct latent_shape, "
            "decoder_latent_shape or ddconfig"
        )


def _encoder_problems(encoder: EncoderSizes, siglip_flag: str) -> Iterator[str]:
    again = f"; name the config.json of its own SigLIP with {siglip_flag}"
    heads, width = encoder.num_attention_heads, encoder.hidden_size
    if width % heads:
        yield f"its SigLIP has {heads} attention heads for a width of {width}{again}"
    if encoder.num_layers < 2:
        yield f"its SigLIP has {encoder.num_layers} layer, and codes are made in front of the last{again}"
    if encoder.hidden_act not in _ACTIVATIONS:
        yield f"its SigLIP's hidden_act is {encoder.hidden_act!r}, and {', '.join(_ACTIVATIONS)} are known{again}"
    if not isinstance(encoder.norm_epsilon, float) or not 0 < encoder.norm_epsilon < 1:
        yield f"its SigLIP's layer_norm_eps is {encoder.norm_epsilon!r}, and a number above 0 is needed{again}"


def _decoder_problems(decoder: DecoderSizes) -> Iterator[str]:
    """Of the section ddconfig."""
    if any(decoder.ch * multiplier % GROUPS for multiplier in decoder.ch_mult):
        yield f"ch of ddconfig is {decoder.ch}, and its multiples by ch_mult must be multiples of {GROUPS}; correct it"
    if decoder.out_ch != 3:
        yield f"out_ch of ddconfig is {decoder.out_ch}, and pictures have 3 channels; correct it"
    if decoder.resolution % 2 ** (len(decoder.ch_mult) - 1):
        yield (
            f"resolution of ddconfig is {decoder.resolution}, which cannot be halved {len(decoder.ch_mult) - 1} times; "
            "correct it or ch_mult"
        )
