"""What VILA-U's published folders hold beside the language model: configurations and tower. No torch at its top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.hf_format import CopiedTensors, Flags, JSONFiles
from megatron_eve.models.language_config import language_config
from megatron_eve.models.vila_u.checks import read_tower
from megatron_eve.models.vila_u.config import VILAUConfig
from megatron_eve.models.vila_u.hf.layouts import TOWER_KEYS
from megatron_eve.models.vila_u.tower_folder import CONFIG, tower_record
from megatron_eve.models.vila_u.tower_settings import TowerSettings

TOWER_FLAG = "--vision-tokenizer"
_VIDEO_FRAMES = 8  # as published


def with_tower_flags(vision: VILAUConfig, flags: Flags) -> VILAUConfig:
    """Settings with the tower that the flags of an import or export name, where they name one."""
    tower, siglip = flags.get("vision_tokenizer"), flags.get("siglip_config")
    if tower is not None:
        vision = replace(vision, vision_tokenizer=str(tower), siglip_config=None)
    return vision if siglip is None else replace(vision, siglip_config=str(siglip))


def tower_of(vision: VILAUConfig) -> TowerSettings:
    """The tower of a model that is exported.

    Raises:
        ConfigError: none is named, or its folder is not there.
    """
    if vision.vision_tokenizer is None:
        raise ConfigError(
            f"{TOWER_FLAG}: the checkpoint does not say which tower made its codes, and an export holds that, too; "
            "name its folder"
        )
    try:
        return read_tower(vision)
    except ConfigError as error:
        raise ConfigError(f"{TOWER_FLAG} {error}") from None


def tower_tensors(vision: VILAUConfig, frozen: Mapping[str, Any] | None, published: bool) -> CopiedTensors:
    """The tower's tensors in an export: all but the depth transformer, or for transformers those that are used.

    Args:
        vision: of the model, with its tower.
        frozen: what identifies the tower that the model was trained with; None where that is not known.
        published: in the published layout.

    Raises:
        ConfigError: the tower is not there, is another one, or is not whole.
    """
    from megatron_eve.models.hf_folder import HFFolder
    from megatron_eve.models.vila_u.tower_export import VILAUFolders
    from megatron_eve.models.vila_u.tower_names import HEAD, stored_names
    from megatron_eve.models.vila_u.tower_weights import fingerprint

    tower, folders = tower_of(vision), VILAUFolders()
    if frozen is not None and (found := fingerprint(tower)) != frozen["sha256"]:
        raise ConfigError(
            f"{TOWER_FLAG} {vision.vision_tokenizer}: is another tower (sha256 {found[:12]}...) than the one that made "
            f"the codes of this model, {frozen['path']} (sha256 {frozen['sha256'][:12]}...); name that one"
        )
    stored = stored_names(HFFolder(tower.folder).keys(), tower)
    for name, shape in folders.shapes(tower).items():
        if name not in stored:
            raise ConfigError(
                f"{TOWER_FLAG} {tower.folder}: has no {name} of shape {shape}, so it is no whole tower; copy it again"
            )
    names: dict[str, str] = {}
    for name, (key, *_) in stored.items():
        if name.startswith(HEAD) or (not published and folders.left_out(name, tower)):
            continue
        copies = folders.published_names(name, tower) if published else (name,)
        names |= {f"{TOWER_KEYS}{copy}": key for copy in copies}
    return CopiedTensors(tower.folder, names, "the tower", keeps_dtype=True)


def published_files(
    model: ModelConfig, vision: VILAUConfig, dtype: str, ids: Mapping[str, int], flags: Flags
) -> JSONFiles:
    """See `HFFormat.published_files`."""
    language = {
        **language_config(model, dtype, ids),
        "model_max_length": None,
        "tokenizer_model_max_length": model.max_position_embeddings,
        "tokenizer_padding_side": "right",
    }
    projector = {
        "architectures": ["MultimodalProjector"],
        "mm_projector_type": "mlp2x_gelu",
        "model_type": "v2l_projector",
        "torch_dtype": dtype,
    }
    tower = tower_of(vision)
    files = {name: dict(fields) for name, fields in tower_record(tower).files.items()}
    files[CONFIG]["rqtransformer"] = depth_config(model, vision, tower, files[CONFIG])
    if flags.get("dtype"):
        files[CONFIG]["torch_dtype"] = dtype
    config = {
        "architectures": ["VILAULlamaModel"],
        "hidden_size": model.hidden_size,
        "image_aspect_ratio": "resize",
        "llm_cfg": language,
        "mm_hidden_size": tower.latent_shape[2],
        "mm_projector_cfg": projector,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": True,
        "mm_use_vi_start_end": True,
        "model_dtype": f"torch.{dtype}",
        "model_type": "vila_u_llama",
        "num_video_frames": _VIDEO_FRAMES,
        "tune_language_model": True,
        "tune_mm_projector": True,
        "tune_vision_tower": False,
        "vision_tower_cfg": files[CONFIG],
    }
    return {
        "config.json": config,
        "llm/config.json": language,
        "mm_projector/config.json": projector,
        **{f"vision_tower/{name}": fields for name, fields in files.items()},
    }


def depth_config(
    model: ModelConfig, vision: VILAUConfig, tower: TowerSettings, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """The section of the depth transformer, which lies in the tower's folder."""
    sizes = {
        "architectures": ["RQTransformer"],
        "block_size": list(tower.code_shape),
        "embed_dim": vision.depth_hidden_size,
        "head": {
            "block": {"n_head": vision.depth_num_attention_heads},
            "n_layer": vision.depth_num_layers,
        },
        "input_embed_dim_1": vision.code_vector_size,
        "input_embed_dim_2": model.hidden_size,
        "model_type": "rqtransformer_model",
        "vocab_size": vision.visual_codebook_size,
    }
    known = fields.get("rqtransformer")
    return {**known, **sizes} if isinstance(known, dict) else sizes


def depth_section(tower: TowerSettings) -> dict[str, Any] | None:
    """The section of the depth transformer in a tower's config.json; None where it has none."""
    found = tower_record(tower).files[CONFIG].get("rqtransformer")
    return found if isinstance(found, dict) else None


def tower_path(folder: Path) -> str:
    """The tower of a published model's folder, as a checkpoint names it, from wherever it is used."""
    return str((folder / "vision_tower").absolute())
