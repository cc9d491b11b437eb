"""Settings of a run that trains VILA-U's tower, the section `vision` of its configuration, and sizes by name. No torch.

Sizes of the encoder and of the text side are those of the SigLIP that the run starts from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.flag_types import Flag
from megatron_eve.config.json_file import read_settings
from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.family import Preset
from megatron_eve.models.towers.tower_training import TowerTraining
from megatron_eve.models.vila_u.tower_folder import encoder_sizes
from megatron_eve.models.vila_u.tower_settings import DecoderSizes, TowerSettings

# What transformers' SigLIP takes for fields of its text side that config.json leaves out.
TEXT_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 32000,
    "max_position_embeddings": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TowerConfig(TowerTraining):
    """The SigLIP that a tower starts from, its codes, its pixel decoder, and the weights of its losses."""

    # Unknown keys in a recipe are errors (read by pydantic in config/recipe.py).
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    vision_tower: Annotated[str | None, Flag("DIR", "none; needed")] = None
    """Folder of the SigLIP in Hugging Face layout that the run starts from, with its text side; nothing is fetched. The
    sizes of the encoder are those of its config.json."""
    code_grid: Annotated[int, Flag("N")] = 4
    """Positions with codes along each side of a picture; divides the grid of patches of --vision-tower."""
    codes_per_position: Annotated[int, Flag("D")] = 4
    """Residual codes of each position."""
    visual_codebook_size: Annotated[int, Flag("K")] = 512
    """Vectors of the codebook."""
    separate_codebooks: bool = False
    """Each depth has a codebook of its own."""
    decoder_channels: Annotated[int, Flag("N")] = 32
    """Channels of the pixel decoder at a multiplier of 1; a multiple of 32."""
    decoder_multipliers: Annotated[tuple[int, ...], Flag("N", "1")] = (1, 1, 1, 1, 2)
    """Multiplier of the channels of each level, that of whole pixels first; each further level is half as fine."""
    decoder_res_blocks: int = 1
    """Residual blocks of a level of the pixel decoder, less one."""
    decoder_attention: Annotated[tuple[int, ...], Flag("N", "none")] = (4,)
    """Sides, in features, of the levels of the pixel decoder that have attention."""
    decoder_input_channels: Annotated[int, Flag("N")] = 32
    """Channels of the features that the pixel decoder reads, behind a 1 x 1 convolution."""
    decoder_grid: Annotated[int | None, Flag("N", "the grid of patches of --vision-tower")] = None
    """Side of the grid that features are resized to for the pixel decoder."""
    picture_size: Annotated[int | None, Flag("PX", "that of the pictures it reads")] = None
    """Side of the pictures that are made of codes, in pixels."""


# Settings that change no shape of the tower, beside those of `TowerTraining`.
START_SETTINGS = ("vision_tower",)

PRESETS: dict[str, Preset] = {
    # The published tower of 256 pixels, on google/siglip-large-patch16-256.
    "vila_u_tower_256": Preset(
        ModelConfig(),
        TowerConfig(
            code_grid=16,
            codes_per_position=4,
            visual_codebook_size=16384,
            decoder_channels=128,
            decoder_multipliers=(1, 1, 2, 2, 4),
            decoder_res_blocks=2,
            decoder_attention=(16,),
            decoder_input_channels=256,
        ),
    ),
    # 4 x 4 codes of depth 4 of pictures of 64 pixels in patches of 16.
    "vila_u_tower_tiny": Preset(ModelConfig(), TowerConfig()),
}

OTHER_NAMES = {
    "--siglip-config": "the run starts from a whole SigLIP; use --vision-tower",
    "--micro-batch-size": "there are no microbatches: each rank takes its slice of --global-batch-size",
    "--image-size": "the pictures have the size that --vision-tower reads",
    "--vision-tokenizer": "use --vision-tower, or --pretrained-checkpoint for the weights of a tower with codes",
}


RANDOM = "random"
"""`--perceptual-weights` in place of a file: random features."""


def perceptual(vision: TowerConfig) -> bool:
    """Is there a perceptual loss?"""
    return bool(vision.reconstruction_weight and vision.perceptual_weight)


class TextSizes(NamedTuple):
    """Of the text side of a SigLIP.

    Attributes:
        vocabulary: rows of its embedding.
        positions: tokens of a text, padding included.
    """

    vocabulary: int
    positions: int


def siglip_fields(vision: TowerConfig) -> Mapping[str, Any]:
    """What config.json of `--vision-tower` says.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    if vision.vision_tower is None:
        raise ConfigError(
            "--vision-tower: name the folder of the SigLIP to start from, such as siglip-large-patch16-256"
        )
    path = Path(vision.vision_tower) / "config.json"
    return read_settings(path, "name a model folder in Hugging Face layout", "--vision-tower")


def text_sizes(vision: TowerConfig) -> TextSizes:
    """Sizes of the text side of `--vision-tower`.

    Raises:
        ConfigError: it has none, or cannot be read.
    """
    fields = siglip_fields(vision)
    text = fields.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError(
            f"--vision-tower {vision.vision_tower}: config.json has no text_config, and texts are compared with "
            "pictures; name a SigLIP with both sides"
        )
    sizes = {**TEXT_DEFAULTS, **text}
    return TextSizes(int(sizes["vocab_size"]), int(sizes["max_position_embeddings"]))


def tower_settings(vision: TowerConfig) -> TowerSettings:
    """What the tower of a run is built from; the sizes are not checked.

    Raises:
        ConfigError: `--vision-tower` is missing or cannot be read.
    """
    fields = siglip_fields(vision)
    assert vision.vision_tower is not None
    encoder = encoder_sizes(f"--vision-tower {vision.vision_tower}: config.json", fields)
    side = encoder.image_size // encoder.patch_size
    depth, size = vision.codes_per_position, vision.visual_codebook_size
    return TowerSettings(
        folder=Path(vision.vision_tower),
        encoder=encoder,
        decoder=DecoderSizes(
            ch=vision.decoder_channels,
            ch_mult=tuple(vision.decoder_multipliers),
            num_res_blocks=vision.decoder_res_blocks,
            attn_resolutions=tuple(vision.decoder_attention),
            z_channels=vision.decoder_input_channels,
            resolution=vision.picture_size or encoder.image_size,
            out_ch=3,
        ),
        latent_shape=(side, side, encoder.hidden_size),
        code_shape=(vision.code_grid, vision.code_grid, depth),
        codebook_sizes=(size,) * depth,
        shared_codebook=not vision.separate_codebooks,
        decoder_latent_shape=None
        if vision.decoder_grid in (None, side)
        else (vision.decoder_grid, vision.decoder_grid),
    )
