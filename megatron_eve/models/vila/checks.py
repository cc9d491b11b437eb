"""Errors in VILA's settings, and in what a checkpoint was made with. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.schema import RunConfig
from megatron_eve.models.family import size_differences
from megatron_eve.models.vila.config import VILAConfig
from megatron_eve.models.vila.geometry import IMAGE_FLAGS, image_setting_errors, image_settings

# Settings that change no shape of the model: another run may start from weights that were made with others.
_FREE = ("vision_tower", "freeze_ViT", "freeze_LM", "recompute_vision", "image_fit", "max_tiles")
# Those of them that change nothing about a run that is resumed.
_FREE_AT_RESUME = ("vision_tower", "recompute_vision")


def check_sizes(vision: VILAConfig) -> Iterator[str]:
    """Errors in the sizes of tower and projector; see `ModelFamily.check_sizes`."""
    names = (
        "vision_patch_size",
        "vision_hidden_size",
        "vision_num_layers",
        "vision_num_attention_heads",
        "vision_ffn_hidden_size",
        "qformer_num_queries",
    )
    bad = [name for name in names if getattr(vision, name) < 1]
    for name in bad:
        yield f"--{name.replace('_', '-')} {getattr(vision, name)}: must be above 0"
    if bad:
        return
    every = {name: getattr(vision, name) for name in IMAGE_FLAGS}
    yield from image_setting_errors(every | image_settings(vision))
    heads = vision.vision_num_attention_heads
    if vision.vision_hidden_size % heads:
        yield (
            f"--vision-num-attention-heads {heads}: must divide --vision-hidden-size {vision.vision_hidden_size}"
        )
    if vision.image_fit == "tiles" and vision.projector_token_order == "column":
        yield "--projector-token-order column: is of VILA-1.5, and --image-fit tiles of NVILA; leave one out"
    layers = vision.vision_num_layers
    if not -layers - 1 <= vision.vision_select_layer <= layers:
        yield (
            f"--vision-select-layer {vision.vision_select_layer}: a vision tower of {layers} layers has the hidden "
            f"states 0 to {layers}, or -{layers + 1} to -1; -2 is the published one"
        )
    if vision.projector_token_order == "column" and vision.projector_type != "mlp_downsample":
        yield (
            f"--projector-token-order column: is for --projector-type mlp_downsample, and this is "
            f"{vision.projector_type}; leave it out"
        )


def check_parallel(config: RunConfig) -> Iterator[str]:
    """Widths that tensor-parallel ranks cannot share; most are the decoder's, and are checked with its sizes."""
    vision, tensor = config.vision, config.parallel.tensor_model_parallel_size
    width = 3 * vision.vision_hidden_size
    if vision.projector_type == "mlp_downsample_3x3_fix" and tensor > 0 and width % tensor:
        yield (
            f"--tensor-model-parallel-size {tensor}: must divide {width}, three times --vision-hidden-size, the inner "
            "width of --projector-type mlp_downsample_3x3_fix"
        )


def check_tower(vision: VILAConfig) -> Iterator[str]:
    """Errors in the folder that `--vision-tower` names: it cannot be read, or holds another tower than the run's."""
    if vision.vision_tower is None:
        return
    from megatron_eve.models.vila.hf.tower import folder_settings

    try:
        stated = folder_settings(Path(vision.vision_tower), "--vision-tower")
    except ConfigError as error:
        yield str(error)
        return
    others = [some for some in stated if some.value != getattr(vision, some.setting)]
    if others:
        theirs = ", ".join(f"--{some.setting.replace('_', '-')} {some.value}" for some in others)
        ours = ", ".join(str(getattr(vision, some.setting)) for some in others)
        yield (
            f"--vision-tower {vision.vision_tower}: its config.json is of {theirs}, and this run has {ours}; use the "
            "preset of a model with this tower, these flags, or another tower"
        )


def check_resume(saved: dict[str, Any], config: RunConfig) -> Iterator[str]:
    """See `ModelFamily.check_resume`."""
    return size_differences(saved["config"].get("vision", {}), config.vision, _FREE_AT_RESUME)


def check_weights(saved: dict[str, Any], config: RunConfig) -> Iterator[str]:
    """See `ModelFamily.check_weights`: stages differ in what trains, and in how a picture becomes a square."""
    return size_differences(saved["config"].get("vision", {}), config.vision, _FREE)
