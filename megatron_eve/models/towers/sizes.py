"""What a folder says of its vision tower, read without loading a weight."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from megatron_eve.config.errors import ConfigError
from megatron_eve.runtime.wrong_content import wrong_content


@dataclass(frozen=True)
class TowerSizes:
    """Sizes of a vision tower.

    Attributes:
        hidden_size: K.
        patch_size: side of a patch in pixels.
        num_layers: encoder layers.
        ffn_hidden_size: inner width of its MLP.
        image_size: side in pixels of the square images that it was made for.
    """

    hidden_size: int
    patch_size: int
    num_layers: int
    ffn_hidden_size: int
    image_size: int


class TowerFlags(NamedTuple):
    """What error messages name.

    Attributes:
        folder: the flag that names the tower's folder.
        trust: the flag, or flags, that let Python files in the folder run.
        example: a tower that would do.
    """

    folder: str
    trust: str
    example: str


# Towers whose config.json is read without transformers, which would load torch first: what transformers takes for
# fields that the file leaves out.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "clip": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    },
    "siglip": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    },
}  # fmt: skip


def tower_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the config.json of a CLIP or a SigLIP says of its vision tower; the values are not checked.

    Args:
        fields: of the vision side alone, or of a whole model.

    Returns:
        The fields of the vision side, with transformers' values for those that it leaves out; `model_type` is clip or
        siglip.

    Raises:
        ValueError: another model, or no settings of a vision side; the message says what is there.
    """
    kind = str(fields.get("model_type"))
    name = kind.removesuffix("_vision_model")
    if name not in _DEFAULTS:
        raise ValueError(f"model_type is {kind!r}, and a CLIP or a SigLIP tower is known here")
    vision = fields.get("vision_config", {} if kind == name else fields)
    if not isinstance(vision, dict):
        raise ValueError(f"vision_config is {vision!r}, not settings by name; copy the folder again")
    return {**_DEFAULTS[name], **vision, "model_type": name}


def _stated_sizes(path: Path) -> TowerSizes | None:
    """The sizes that config.json says; None where transformers is needed to know them, or to say what is wrong."""
    try:
        fields = tower_fields(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        return None
    names = ("hidden_size", "patch_size", "num_hidden_layers", "intermediate_size", "image_size")
    sizes = [fields[name] for name in names]
    return TowerSizes(*sizes) if all(type(size) is int and size > 0 for size in sizes) else None


@contextmanager
def remote_code_lock(trust_remote_code: bool) -> Iterator[None]:
    """With code from a model's folder, let one process load at a time.

    transformers copies that code into a cache which all ranks share, and imports it from there: a rank may find
    a file that another one is still writing.
    """
    if not trust_remote_code:
        yield
        return
    from filelock import FileLock
    from transformers.utils import HF_MODULES_CACHE

    Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(HF_MODULES_CACHE) / "megatron_eve.lock"):
        yield


@cache
def tower_sizes(folder: str, trust_remote_code: bool, flags: TowerFlags) -> TowerSizes:
    """Read config.json of a vision tower, or of a model that has one beside a text tower.

    Sizes that the file leaves out are those that transformers knows for its model type.

    Args:
        folder: of the tower.
        trust_remote_code: let Python files in it run.
        flags: that both were given with.

    Raises:
        ConfigError: no such file, or none that describes a tower with a patch grid.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(
            f"{flags.folder} {folder}: no config.json there; name a model folder in Hugging Face layout"
        )
    if other := wrong_content(Path(folder) / "config.json"):
        raise ConfigError(f"{flags.folder} {folder}: config.json cannot be read: it {other}")
    if (stated := _stated_sizes(Path(folder) / "config.json")) is not None:
        return stated
    import transformers

    try:
        with remote_code_lock(trust_remote_code):
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        config = getattr(config, "vision_config", None) or config
        width = int(config.hidden_size)
        # DINOv2 gives a ratio instead.
        inner = getattr(config, "intermediate_size", None) or width * getattr(config, "mlp_ratio", 4)
        return TowerSizes(
            width, int(config.patch_size), int(config.num_hidden_layers), int(inner), int(config.image_size)
        )
    except Exception as error:  # transformers raises nearly anything on a file it cannot read
        raise ConfigError(
            f"{flags.folder} {folder}: config.json does not describe a vision tower with a patch grid that "
            f"transformers {transformers.__version__} knows ({type(error).__name__}: {error}); name the folder of "
            f"{flags.example} or of another tower, or, if you trust code in this one, let it run ({flags.trust})"
        ) from error
