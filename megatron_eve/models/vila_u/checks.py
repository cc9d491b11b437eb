"""Errors in VILA-U's settings, and in what a checkpoint was made with. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.schema import RunConfig
from megatron_eve.models.family import size_differences
from megatron_eve.models.vila_u.config import TRAINING_SETTINGS, VILAUConfig
from megatron_eve.models.vila_u.geometry import image_setting_errors, image_settings
from megatron_eve.models.vila_u.tower_folder import read_tower_folder
from megatron_eve.models.vila_u.tower_settings import TowerSettings

# Of those, what changes nothing about a run that is resumed: the tower itself is compared by its fingerprint.
_FREE_AT_RESUME = ("vision_tokenizer", "siglip_config", "visual_loss_chunk")
# Codes are stored as 16 bits.
_MOST_CODES = 1 << 16


def flag(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def check_sizes(vision: VILAUConfig) -> Iterator[str]:
    """Errors in the sizes of codes and of the depth transformer; see `ModelFamily.check_sizes`."""
    yield from image_setting_errors(image_settings(vision))
    names = (
        "codes_per_position",
        "visual_codebook_size",
        "code_vector_size",
        "depth_hidden_size",
        "depth_num_layers",
        "depth_num_attention_heads",
        "visual_loss_chunk",
    )
    bad = [name for name in names if (value := getattr(vision, name)) is not None and value < 1]
    for name in bad:
        yield f"{flag(name)} {getattr(vision, name)}: must be above 0"
    if bad:
        return
    if vision.visual_codebook_size > _MOST_CODES:
        yield (
            f"--visual-codebook-size {vision.visual_codebook_size}: codes are stored as 16 bits, so at most "
            f"{_MOST_CODES:,} can be told apart"
        )
    heads = vision.depth_num_attention_heads
    if vision.depth_hidden_size % heads:
        yield f"--depth-num-attention-heads {heads}: must divide --depth-hidden-size {vision.depth_hidden_size}"
    if not 0 <= vision.depth_dropout < 1:
        yield f"--depth-dropout {vision.depth_dropout:g}: must lie in [0, 1); 0.1 is the published one"
    if not 0 <= vision.visual_loss_weight < math.inf:
        yield f"--visual-loss-weight {vision.visual_loss_weight:g}: must be 0 or more, and finite"


def check_parallel(config: RunConfig) -> Iterator[str]:
    """Sizes that tensor-parallel ranks cannot share; most are the decoder's, and are checked with its sizes."""
    vision, tensor = config.vision, config.parallel.tensor_model_parallel_size
    heads = vision.depth_num_attention_heads
    if tensor > 0 and heads > 0 and heads % tensor:
        yield f"--tensor-model-parallel-size {tensor}: must divide --depth-num-attention-heads {heads}"
    if tensor > 0 and vision.visual_codebook_size % tensor:
        yield (
            f"--tensor-model-parallel-size {tensor}: must divide --visual-codebook-size {vision.visual_codebook_size}"
        )


def check_tower(config: RunConfig) -> Iterator[str]:
    """Errors in the folder that `--vision-tokenizer` names: none, one that cannot be read, or another tower's."""
    vision: VILAUConfig = config.vision
    if vision.vision_tokenizer is None:
        if not config.data.mock_data:
            yield (
                "--vision-tokenizer: name the folder of the tower that made the codes of the dataset "
                "(tools/tokenize_images.py --tower)"
            )
        return
    try:
        tower = read_tower(vision)
    except ConfigError as error:
        yield f"--vision-tokenizer {error}"
        return
    if tower.grid[0] != tower.grid[1]:
        yield (
            f"--vision-tokenizer {vision.vision_tokenizer}: makes {tower.grid[0]} x {tower.grid[1]} codes of a "
            "picture, and a square grid is needed; use a tower with one"
        )
        return
    if len(set(tower.codebook_sizes)) > 1:
        yield (
            f"--vision-tokenizer {vision.vision_tokenizer}: has codebooks of {list(tower.codebook_sizes)} vectors, and "
            "a decoder needs one size at all depths; use a tower with one"
        )
        return
    others = {name: value for name, value in tower_sizes(tower).items() if getattr(vision, name) != value}
    if others:
        theirs = ", ".join(_written(name, value) for name, value in others.items())
        ours = ", ".join(_written(name, getattr(vision, name)) for name in others)
        yield (
            f"--vision-tokenizer {vision.vision_tokenizer}: is of {theirs}, and this run has {ours}; use the preset of "
            "a model with this tower, these flags, or another tower"
        )


def _written(name: str, value: Any) -> str:
    """A setting as on the command line."""
    if isinstance(value, bool):
        return flag(name) if value else f"--no-{flag(name)[2:]}"
    return f"{flag(name)} {value}"


def read_tower(vision: VILAUConfig) -> TowerSettings:
    """The tower that `--vision-tokenizer` names.

    Raises:
        ConfigError: it is not the folder of one.
    """
    assert vision.vision_tokenizer is not None
    siglip = None if vision.siglip_config is None else Path(vision.siglip_config)
    return read_tower_folder(Path(vision.vision_tokenizer), siglip)


def tower_sizes(tower: TowerSettings) -> dict[str, Any]:
    """The settings of a model that reads the codes of a tower."""
    height, width = tower.latent_shape[0] // tower.grid[0], tower.latent_shape[1] // tower.grid[1]
    return {
        "code_grid": tower.grid[0],
        "codes_per_position": tower.depth,
        "visual_codebook_size": tower.codebook_size,
        "code_vector_size": height * width * tower.latent_shape[2],
        "separate_codebooks": not tower.shared_codebook,
    }


def tower_fingerprint(vision: VILAUConfig) -> dict[str, Any] | None:
    """What identifies the tower of a run, kept in its checkpoints; None where none is named.

    Raises:
        ConfigError: a tower that cannot be read.
    """
    if vision.vision_tokenizer is None:
        return None
    from megatron_eve.models.vila_u.tower_weights import fingerprint

    sha256 = fingerprint(read_tower(vision))
    return {"path": vision.vision_tokenizer, "sha256": sha256}


def check_resume(saved: dict[str, Any], config: RunConfig, frozen: dict[str, Any] | None) -> Iterator[str]:
    """See `ModelFamily.check_resume`: a resumed run goes on with the codes of the very tower, wherever that lies."""
    yield from size_differences(saved["config"].get("vision", {}), config.vision, _FREE_AT_RESUME)
    if other := _other_tower(saved, frozen):
        yield f"{other}: resume with the same --vision-tokenizer, or start a new run"


def check_weights(saved: dict[str, Any], config: RunConfig) -> Iterator[str]:
    """See `ModelFamily.check_weights`: the codebook is part of the weights, and that of the tower is another."""
    yield from size_differences(saved["config"].get("vision", {}), config.vision, TRAINING_SETTINGS)
    if saved.get("frozen") and (other := _other_tower(saved, tower_fingerprint(config.vision))):
        yield (
            f"{other}: name that tower with --vision-tokenizer, or start from a language model, which takes the "
            "codebook of any"
        )


def _other_tower(saved: dict[str, Any], ours: dict[str, Any] | None) -> str | None:
    """Says that a checkpoint was made with another tower than a run's, if it was."""
    known = saved.get("frozen")
    if not known or not ours or known["sha256"] == ours["sha256"]:
        return None
    return (
        f"was made with the vision tower {known['path']} (sha256 {known['sha256'][:12]}...), and that of "
        f"{ours['path']} is another ({ours['sha256'][:12]}...)"
    )
