"""Names of the tensors of a VILA-U tower: in published folders, in checkpoints, and in `tower.UnifiedTower`.

A checkpoint keeps the names of a published folder, each tensor once: a published folder may hold a shared codebook once
for each depth, and two scalars of the SigLIP under two names, since older writers wrote them so. `rqtransformer.*`
is the head of the decoder that draws: it lies in the tower's folder and has no part in codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from megatron_eve.config.errors import ConfigError
from megatron_eve.models.vila_u.tower_settings import TowerSettings

HEAD = "rqtransformer."
_PREFIX = "rqvaesiglip."
_ENCODER = f"{_PREFIX}siglip_model.vision_model."
_TEXT = f"{_PREFIX}siglip_model.text_model."
_ALIASES = {f"{_PREFIX}siglip_model.{name}": f"{_PREFIX}{name}" for name in ("logit_scale", "logit_bias")}
_CODEBOOK = re.compile(
    rf"{re.escape(_PREFIX)}quantizer\.codebooks\.(\d+)\.(weight|cluster_size_ema|embed_ema)"
)
_OTHERS = re.compile(
    rf"{re.escape(HEAD)}.+|{re.escape(_PREFIX)}(?:siglip_model\.(?:vision|text)_model\..+|logit_scale|logit_bias|"
    r"post_quant_conv\.(?:weight|bias)|decoder\..+)"
)


def published_name(name: str) -> str:
    """The name in a published folder of a tensor of `tower.UnifiedTower`, or of the tower in training."""
    if name.startswith("encoder."):
        return _ENCODER + name.removeprefix("encoder.")
    if name.startswith("text."):
        return _TEXT + name.removeprefix("text.")
    return _PREFIX + name


def stored_name(name: str, tower: TowerSettings) -> str | None:
    """The name in a checkpoint of a tensor of a published folder: of copies the first's; None of an unknown one."""
    if name in _ALIASES:
        return _ALIASES[name]
    if found := _CODEBOOK.fullmatch(name):
        level = int(found[1])
        if level >= tower.depth:
            return None
        return _codebook(0 if tower.shared_codebook else level, found[2])
    return name if _OTHERS.fullmatch(name) else None


def stored_names(keys: Iterable[str], tower: TowerSettings) -> dict[str, tuple[str, ...]]:
    """Names in a checkpoint of the tensors of a folder, each with its keys there; unknown keys are left out.

    Raises:
        ConfigError: a tensor that is there more than once, and not as often as the tower's settings ask for.
    """
    found: dict[str, tuple[str, ...]] = {}
    for key in sorted(keys):
        if (name := stored_name(key, tower)) is not None:
            found[name] = (*found.get(name, ()), key)
    for name, some in found.items():
        if len(some) not in (1, wanted := len(copies(name, tower))):
            raise ConfigError(
                f"{tower.folder}: holds {name} {len(some)} times, and its config.json asks for {wanted}; copy both "
                "from the same model"
            )
    return found


def copies(name: str, tower: TowerSettings) -> tuple[str, ...]:
    """The names in a published folder of a tensor of a checkpoint, its copies included."""
    found = _CODEBOOK.fullmatch(name)
    if found and tower.shared_codebook:
        return tuple(_codebook(level, found[2]) for level in range(tower.depth))
    return (name, *(alias for alias, first in _ALIASES.items() if first == name))


def decides_codes(name: str, tower: TowerSettings) -> bool:
    """Do codes depend on a tensor of this name in a checkpoint? On the encoder's last layer they do not."""
    if found := _CODEBOOK.fullmatch(name):
        return found[2] == "weight"
    return name.startswith(tuple(_encoder_parts(tower)))


def is_codebook(name: str) -> bool:
    """Is a tensor of this name in a checkpoint part of a codebook?"""
    return _CODEBOOK.fullmatch(name) is not None


def is_used(name: str, tower: TowerSettings) -> bool:
    """Do codes, or pictures of codes, depend on a tensor of this name in a checkpoint?"""
    pictures = (f"{_PREFIX}post_quant_conv.", f"{_PREFIX}decoder.")
    return decides_codes(name, tower) or name.startswith(pictures)


def _encoder_parts(tower: TowerSettings) -> Iterator[str]:
    yield f"{_ENCODER}embeddings."
    for layer in range(tower.encoder.num_layers - 1):
        yield f"{_ENCODER}encoder.layers.{layer}."


def _codebook(level: int, name: str) -> str:
    return f"{_PREFIX}quantizer.codebooks.{level}.{name}"
