"""Scaled rotary embeddings in config.json of a language model (transformers' `rope_scaling`): read and written.

Two kinds are computed: linear, which divides positions, and llama3, Llama 3.1's, which divides low frequencies. Imports
no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.schema import ModelConfig

# Kinds of scaling (transformers' `rope_type`) that compute the same as none when their factor is 1.
_NONE_AT_FACTOR_1 = ("linear", "dynamic", "llama3")
# What megatron-core's RotaryEmbedding has as constants; those of Llama 3.1, 3.2 and 3.3.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

SCALING_SETTINGS = ("rotary_seq_len_interpolation_factor", "use_rope_scaling", "rope_scaling_factor")
"""The settings of `ModelConfig` that scale a rotary embedding."""


def rope_entries(fields: Mapping[str, Any], path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Settings of the rotary embedding that config.json states, each with its name: of transformers 5, and of 4.

    Args:
        fields: of a language model.
        path: of the file, for messages.

    Raises:
        ConfigError: an entry that holds no settings by name.
    """
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        some = fields.get(name)
        if isinstance(some, dict):
            some = some.get("full_attention") or some  # transformers 5 may have one for each kind of layer
        if some and not isinstance(some, dict):
            raise ConfigError(f"{path}: {name} is {some!r}, not settings by name; copy the folder again")
        if some:
            found.append((name, some))
    return found


def read_scaling(fields: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The settings of `ModelConfig` that scale a language model's rotary embedding; none where it is not scaled.

    Args:
        fields: of a language model.
        path: of their file, for messages.

    Raises:
        ConfigError: a kind of scaling, or settings of it, that are not computed here.
    """
    scaling: dict[str, Any] = {}
    for name, some in rope_entries(
        fields, path
    ):  # of two, transformers takes `rope_scaling`, which is the last
        scaling = _scaling(some, f"{path}: ", f" ({name}: {some})")
    return scaling


def _scaling(some: Mapping[str, Any], start: str, end: str) -> dict[str, Any]:
    """The settings that one entry means; messages begin and end with the other two."""
    if some.get("partial_rotary_factor") not in (None, 1):
        raise ConfigError(
            f"{start}partial_rotary_factor is {some['partial_rotary_factor']!r}, and rotary embeddings are of the "
            f"whole head here{end}"
        )
    kind, factor = some.get("rope_type") or some.get("type") or "default", some.get("factor")
    if kind == "default" or (kind in _NONE_AT_FACTOR_1 and factor == 1):
        return {}
    if kind not in ("linear", "llama3"):
        raise ConfigError(
            f"{start}rope_type is {kind!r}, and rotary embeddings are not scaled here but by linear and llama3{end}"
        )
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 1 <= factor < float("inf"):
        raise ConfigError(f"{start}factor is {factor!r}, and a number from 1 on is needed{end}")
    if kind == "linear":
        return {"rotary_seq_len_interpolation_factor": float(factor)}
    for name, constant in _LLAMA3.items():
        if some.get(name) != constant:
            raise ConfigError(
                f"{start}{name} is {some.get(name)!r}, and {constant:g} is what llama3 is computed with here{end}"
            )
    return {"use_rope_scaling": True, "rope_scaling_factor": float(factor)}


def scaling_field(model: ModelConfig) -> dict[str, Any] | None:
    """`rope_scaling` of config.json; linear in the two fields that transformers 4.31 asks for and later ones take."""
    if model.rotary_seq_len_interpolation_factor is not None:
        return {"type": "linear", "factor": float(model.rotary_seq_len_interpolation_factor)}
    if model.use_rope_scaling:
        return {"rope_type": "llama3", "factor": float(model.rope_scaling_factor), **_LLAMA3}
    return None


def scaling_words(model: ModelConfig) -> str:
    """How rotary embeddings of these settings are scaled, for messages."""
    if model.rotary_seq_len_interpolation_factor is not None:
        factor = model.rotary_seq_len_interpolation_factor
        return f"scaled linearly (--rotary-seq-len-interpolation-factor {factor:g})"
    if model.use_rope_scaling:
        return (
            f"scaled as Llama 3.1's (--use-rope-scaling --rope-scaling-factor {model.rope_scaling_factor:g})"
        )
    return "not scaled"


def scaling_difference(before: ModelConfig, now: ModelConfig) -> str | None:
    """How a run scales rotary embeddings otherwise than the model that it starts from; None where it does not."""
    if scaling_words(before) == scaling_words(now):
        return None
    return f"rotary embeddings are {scaling_words(before)}, and {scaling_words(now)} in this run"


def position_note(before: ModelConfig, now: ModelConfig) -> str | None:
    """What a run does, or could do, about positions that a model was not trained on; None where there are none.

    Args:
        before: sizes of the model that it starts from.
        now: the run's.
    """
    if adds_linear_scaling(before, now):
        return scaling_difference(before, now)
    longer = -(-now.max_position_embeddings // before.max_position_embeddings)
    if longer > 1 and scaling_field(now) is None:
        return (
            f"holds a model of {before.max_position_embeddings} positions, and samples of this run may have "
            f"{now.max_position_embeddings}; --rotary-seq-len-interpolation-factor {longer} would divide theirs"
        )
    return None


def adds_linear_scaling(before: ModelConfig, now: ModelConfig) -> bool:
    """Does a run divide positions of a model that was not scaled, so as to take longer samples (interpolation)?"""
    return scaling_field(before) is None and now.rotary_seq_len_interpolation_factor is not None
