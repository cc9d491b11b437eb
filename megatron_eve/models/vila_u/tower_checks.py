"""Errors in the settings of a run that trains VILA-U's tower. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.schema import RunConfig
from megatron_eve.models.vila_u.tower_config import (
    RANDOM,
    TowerConfig,
    perceptual,
    text_sizes,
    tower_settings,
)
from megatron_eve.models.vila_u.tower_folder import read_tower_folder
from megatron_eve.models.vila_u.tower_settings import GROUPS, TowerSettings, size_problems
from megatron_eve.runtime.digests import file_digest

_WEIGHTS = (
    "contrastive_weight",
    "reconstruction_weight",
    "perceptual_weight",
    "commitment_weight",
    "adversarial_weight",
)
_AT_LEAST_ONE = (
    "code_grid",
    "codes_per_position",
    "visual_codebook_size",
    "decoder_channels",
    "decoder_res_blocks",
    "decoder_input_channels",
    "decoder_grid",
    "picture_size",
)
# Codes are stored as 16 bits.
_MOST_CODES = 1 << 16


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_sizes(vision: TowerConfig) -> Iterator[str]:
    """Errors in settings that need no file; see `ModelFamily.check_sizes`."""
    for name in _AT_LEAST_ONE:
        value = getattr(vision, name)
        if value is not None and value < 1:
            yield f"{_flag(name)} {value}: must be above 0"
    if vision.visual_codebook_size > _MOST_CODES:
        yield (
            f"--visual-codebook-size {vision.visual_codebook_size}: codes are stored as 16 bits, so at most "
            f"{_MOST_CODES:,} can be told apart"
        )
    if vision.visual_codebook_size == 1:
        yield "--visual-codebook-size 1: one vector tells nothing apart; use 2 or more"
    if not vision.decoder_multipliers or any(one < 1 for one in vision.decoder_multipliers):
        yield "--decoder-multipliers: give a number above 0 for each level of the pixel decoder, such as 1 1 2 2 4"
    if vision.decoder_channels % GROUPS:
        yield f"--decoder-channels {vision.decoder_channels}: must be a multiple of {GROUPS}"
    for name in _WEIGHTS:
        if not 0 <= getattr(vision, name) < math.inf:
            yield f"{_flag(name)} {getattr(vision, name):g}: must be 0 or more, and finite"
    if not vision.contrastive_weight and not vision.reconstruction_weight:
        yield "--contrastive-weight 0: with --reconstruction-weight 0 there is nothing to train; raise one"
    if vision.gan_start < 0:
        yield f"--gan-start {vision.gan_start}: must be 0 or more"


def check_start(config: RunConfig) -> Iterator[str]:
    """Errors in the files that a run starts from, and in sizes that do not fit them; see `ModelFamily.check`."""
    vision: TowerConfig = config.vision
    if any(check_sizes(vision)):
        return  # said already
    try:
        tower = tower_settings(vision)
        if vision.contrastive_weight:
            text_sizes(vision)
    except ConfigError as error:
        yield str(error)
        return
    yield from _grid_errors(vision, tower)
    if perceptual(vision) and vision.perceptual_weights is None:
        yield (
            "--perceptual-weights: name the file with the weights of torchvision's VGG-16, or leave that loss out with "
            "--perceptual-weight 0"
        )
    elif perceptual(vision) and vision.perceptual_weights != RANDOM:
        for flag in ("perceptual_weights", "perceptual_linear"):
            name = getattr(vision, flag)
            if name is not None and not Path(name).is_file():
                yield f"{_flag(flag)} {name}: no such file; name the one with the weights"
    if vision.contrastive_weight and config.training.global_batch_size < 2:
        yield (
            f"--global-batch-size {config.training.global_batch_size}: the contrastive loss compares a picture with "
            "the texts of others; use 2 or more, or --contrastive-weight 0"
        )
    size = config.training.global_batch_size
    if vision.contrastive_weight and size > 1 and config.total_samples % size == 1:
        yield (
            f"--train-samples {config.total_samples}: the last step would have one pair, and the contrastive loss "
            f"needs two; use {config.total_samples - 1}"
        )


def check_pretrained(vision: TowerConfig, folder: Path) -> Iterator[str]:
    """Why a run cannot start from the tower in a folder; see `TowerFamily.check_pretrained`."""
    flag = f"--pretrained-checkpoint {folder}"
    assert vision.vision_tower is not None
    try:
        theirs, ours = read_tower_folder(folder, Path(vision.vision_tower)), tower_settings(vision)
    except ConfigError as error:
        yield f"{flag}: {error}"
        return
    for what, one, other in (
        ("rows and columns of codes (--code-grid)", theirs.code_shape[:2], ours.code_shape[:2]),
        ("depth of codes (--codes-per-position)", theirs.code_shape[2], ours.code_shape[2]),
        (
            "sizes of codebooks (--visual-codebook-size)",
            sorted({*theirs.codebook_sizes}),
            sorted({*ours.codebook_sizes}),
        ),
        (
            "one codebook for all depths (--no-separate-codebooks)",
            theirs.shared_codebook,
            ours.shared_codebook,
        ),
        ("features of a picture", theirs.latent_shape, ours.latent_shape),
        ("encoder", theirs.encoder, ours.encoder),
        ("pixel decoder", theirs.decoder, ours.decoder),
        ("grid of the pixel decoder", theirs.decoder_latent_shape, ours.decoder_latent_shape),
    ):
        if one != other:
            yield f"{flag}: its {what}: {one}, and of this run: {other}; use its sizes, or another tower"


def perceptual_fingerprint(vision: TowerConfig) -> dict[str, Any] | None:
    """What identifies the network of the perceptual loss, kept in checkpoints; None without one of files.

    Raises:
        OSError: a file cannot be read.
    """
    if not perceptual(vision) or vision.perceptual_weights in (None, RANDOM):
        return None
    paths = [name for name in (vision.perceptual_weights, vision.perceptual_linear) if name is not None]
    return {"path": " ".join(paths), "sha256": " ".join(file_digest(Path(path)) for path in paths)}


def _grid_errors(vision: TowerConfig, tower: TowerSettings) -> Iterator[str]:
    """Grids of features, codes and pixel decoder that do not go together."""
    named, side = f"--vision-tower {vision.vision_tower}", tower.latent_shape[0]
    if tower.encoder.image_size % tower.encoder.patch_size:
        yield (
            f"{named}: its pictures of {tower.encoder.image_size} pixels are no whole number of patches of "
            f"{tower.encoder.patch_size}; use another SigLIP"
        )
        return
    if side % vision.code_grid:
        yield f"--code-grid {vision.code_grid}: must divide {side}, the patches along a side of {named}; use {side}"
        return
    levels, grid = len(vision.decoder_multipliers), vision.decoder_grid or side
    if tower.picture_size != grid * 2 ** (levels - 1):
        yield (
            f"--decoder-multipliers {' '.join(map(str, vision.decoder_multipliers))}: {levels} levels make pictures of "
            f"{grid * 2 ** (levels - 1)} pixels from a grid of {grid}, and {tower.picture_size} are needed; give "
            "another number of levels, --decoder-grid or --picture-size"
        )
        return
    for problem in size_problems(tower, "--vision-tower"):
        yield f"{named}: {problem}"
