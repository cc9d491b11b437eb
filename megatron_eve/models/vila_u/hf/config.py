"""config.json of VILA-U's folders: what is read of it, and what cannot be computed here. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.json_file import read_settings
from megatron_eve.models.hf_format import Stated
from megatron_eve.models.vila_u.hf.layouts import is_published

_TOWER, _DEPTH = "rqvaesiglip", "rqtransformer"
_REMEDY = "copy the folder again"
# Sizes of the depth transformer in its section of config.json, by our settings.
_DEPTH_FIELDS = {
    "depth_hidden_size": ("embed_dim",),
    "depth_num_layers": ("head", "n_layer"),
    "depth_num_attention_heads": ("head", "block", "n_head"),
}


def field_errors(fields: Mapping[str, Any]) -> Iterator[str]:
    """See `HFFormat.check_fields`."""
    if not is_published(fields):
        return
    section = fields.get("mm_projector_cfg")
    projector = section.get("mm_projector_type") if isinstance(section, dict) else None
    if projector not in (None, "mlp2x_gelu"):
        yield f"mm_projector_type is {projector!r}, and mlp2x_gelu is known here"
    if "llm_cfg" not in fields:
        yield "llm_cfg is not there, so the folders llm/, mm_projector/ and vision_tower/ are not either"


def stated(fields: Mapping[str, Any], folder: Path) -> list[Stated]:
    """See `HFFormat.stated`: sizes of the codes and of the depth transformer, by vision_tower/config.json; of a folder
    for transformers by its sections.

    Raises:
        ConfigError: it is not there, or lacks a size.
    """
    path = folder / "vision_tower" / "config.json"
    if is_published(fields):
        fields = read_settings(path, _REMEDY)
    else:
        path, tower = folder / "config.json", dict(fields["vision_config"] or {})
        tower["n_embed"] = tower.get("codebook_sizes")
        fields = {_TOWER: tower, _DEPTH: fields.get("depth_config")}
    sizes = depth_settings(fields, path) | _code_sizes(fields, path)
    classes = _number(fields, path, _DEPTH, ("vocab_size",))
    if classes != sizes["visual_codebook_size"]:
        raise ConfigError(
            f"{path}: {_DEPTH} has {classes} classes and the codebook {sizes['visual_codebook_size']} vectors; "
            f"{_REMEDY}"
        )
    return [Stated(name, value, f"{name.replace('_', ' ')} of vision_tower") for name, value in sizes.items()]


def depth_settings(fields: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Sizes of the depth transformer.

    Args:
        fields: of the tower's config.json.
        path: of that, for messages.

    Raises:
        ConfigError: one is missing.
    """
    return {name: _number(fields, path, _DEPTH, keys) for name, keys in _DEPTH_FIELDS.items()}


def _code_sizes(fields: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Settings of the codes."""
    code, latent = (_numbers(fields, path, name) for name in ("code_shape", "latent_shape"))
    rows, columns, depth = code
    if rows != columns or latent[0] % rows or latent[1] % columns:
        raise ConfigError(
            f"{path}: code_shape is {list(code)} on latent_shape {list(latent)}, and a square grid that divides that "
            "of the features is needed"
        )
    shared, sizes = bool(_value(fields, path, _TOWER, ("shared_codebook",))), fields[_TOWER].get("n_embed")
    every = sizes if isinstance(sizes, list) else [sizes] * depth
    if len(every) != depth or any(type(size) is not int or size < 1 for size in every):
        raise ConfigError(f"{path}: n_embed is {sizes!r}, and {depth} sizes above 0 are needed; {_REMEDY}")
    if len(set(every)) > 1:
        raise ConfigError(f"{path}: n_embed is {sizes!r}, and codebooks of one size are needed")
    return {
        "code_grid": rows,
        "codes_per_position": depth,
        "visual_codebook_size": every[0],
        "code_vector_size": latent[0] // rows * (latent[1] // columns) * latent[2],
        "separate_codebooks": not shared,
    }


def _numbers(fields: Mapping[str, Any], path: Path, name: str) -> list[int]:
    values = _value(fields, path, _TOWER, (name,))
    if (
        not isinstance(values, list)
        or len(values) != 3
        or any(type(some) is not int or some < 1 for some in values)
    ):
        raise ConfigError(f"{path}: {name} is {values!r}, and three numbers above 0 are needed; {_REMEDY}")
    return values


def _number(fields: Mapping[str, Any], path: Path, section: str, keys: tuple[str, ...]) -> int:
    value = _value(fields, path, section, keys)
    if type(value) is not int or value < 1:
        raise ConfigError(f"{path}: {section} has {'.'.join(keys)} {value!r}, and a number above 0 is needed")
    return value


def _value(fields: Mapping[str, Any], path: Path, section: str, keys: tuple[str, ...]) -> Any:
    found: Any = fields
    for name in (section, *keys):
        if not isinstance(found, dict) or name not in found:
            raise ConfigError(f"{path}: has no {'.'.join((section, *keys))}; {_REMEDY}")
        found = found[name]
    return found
