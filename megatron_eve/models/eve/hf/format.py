"""EVE's folders in Hugging Face layout: see `HFFormat`. Imports no torch at its top."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.schema import ModelConfig, RunConfig
from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.models.eve.geometry import PATCH_SIZE
from megatron_eve.models.eve.hf.config import (
    code_files,
    image_size_of,
    published_config,
    published_preprocessor,
    teacher_size_of,
    transformers_files,
)
from megatron_eve.models.eve.parameters import ALIGNING_LAYER
from megatron_eve.models.eve.published import ALIGNING_HF_KEYS, IGNORED_KEYS, PUBLISHED_TAP_INTERVAL
from megatron_eve.models.hf_format import CopiedTensors, Flags, FolderTensors, HFFormat, JSONFiles

if TYPE_CHECKING:
    from megatron_eve.models.name_rules import Rule

# Of a teacher's folder: not CLIP's text side, nor a buffer of older versions.
_TEACHER_KEYS = re.compile(r"vision_model\.(?!.*position_ids$).*")
_TOWER = "a vision tower is the teacher (--teacher-model); take the folder of a language model or an EVE"


class EVEFormat(HFFormat):
    """See `HFFormat`."""

    title = "EVE v1"
    model_types: tuple[str, ...] = ("eve",)
    other_model_types: Mapping[str, str] = {
        **dict.fromkeys(("clip", "clip_vision_model", "siglip", "siglip_vision_model", "dinov2"), _TOWER),
    }
    fields: Mapping[str, str] = {"mm_hidden_size": "patch_embedding_size"}
    optional_parts: Mapping[str, re.Pattern[str]] = {ALIGNING_LAYER: ALIGNING_HF_KEYS}
    ignored_keys: Mapping[str, str] = IGNORED_KEYS
    left_out = "the aligning layer, which only training needs"
    rotary_buffers = True

    # --- weights ---

    def rules(self, model: ModelConfig, vision: EVEConfig) -> Sequence[Rule]:
        """See `HFFormat.rules`."""
        from megatron_eve.models.eve.names import rules

        return rules(vision, model.num_layers)

    def has_part(self, part: str, vision: EVEConfig) -> bool:
        """See `HFFormat.has_part`."""
        return part != ALIGNING_LAYER or vision.patch_aligning

    def check_weights(self, vision: EVEConfig, source: FolderTensors) -> Iterator[str]:
        """See `HFFormat.check_weights`: the depths of an aligning layer must be the published ones."""
        interval, keys = vision.tap_interval, list(source.keys())
        aligned = any(ALIGNING_HF_KEYS.fullmatch(key) for key in keys)
        if vision.patch_aligning and aligned and interval != PUBLISHED_TAP_INTERVAL:
            yield (
                f"its aligning layer is tapped every {PUBLISHED_TAP_INTERVAL} layers, this run has --tap-interval "
                f"{interval}; use {PUBLISHED_TAP_INTERVAL}, or train with --no-patch-aligning"
            )

    # --- import ---

    def add_import_flags(self, parser: argparse.ArgumentParser) -> None:
        """See `HFFormat.add_import_flags`."""
        parser.add_argument(
            "--teacher-model",
            metavar="DIR",
            help="folder of the teacher (CLIP), for a checkpoint with a patch aligning layer: its sizes and hashes are "
            "recorded, its weights are not copied (default: no aligning layer, and a run with --patch-aligning gives "
            "it random weights)",
        )
        parser.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="run Python files of the teacher's folder, for towers that transformers does not know (EVA-CLIP); no "
            "other code of a folder is ever run",
        )
        parser.add_argument(
            "--image-size",
            type=int,
            metavar="PX",
            help="long side of an image: 672, or 1344 for the HD model (default: as the folder says, or 672)",
        )
        parser.add_argument(
            "--patch-embedding-size",
            type=int,
            default=1024,
            metavar="N",
            help="width of the patch embedding layer that a language model gets",
        )

    def check_import_flags(self, flags: Flags) -> Iterator[str]:
        """See `HFFormat.check_import_flags`."""
        if flags["trust_remote_code"] and not flags["teacher_model"]:
            yield "--trust-remote-code: is about the teacher's folder; add --teacher-model, or leave it out"
        for name in ("patch_embedding_size", "image_size"):
            value = flags[name]
            if value is not None and value < 1:
                yield f"--{name.replace('_', '-')} {value}: must be above 0"
        if flags["teacher_model"]:
            _teacher_settings(flags).tower()

    def import_settings(self, fields: Mapping[str, Any], folder: Path, flags: Flags) -> EVEConfig:
        """See `HFFormat.import_settings`: with the aligning layer where a teacher is named."""
        size = flags["image_size"] or image_size_of(fields) or 672
        teacher_size, teacher_width, aligning = teacher_size_of(folder, size), 1024, False
        if flags["teacher_model"]:
            tower = _teacher_settings(flags).tower()
            # Its patch grid, at the side of this model's patches.
            teacher_size = tower.image_size // tower.patch_size * PATCH_SIZE
            teacher_width, aligning = tower.hidden_size, True
        return EVEConfig(
            patch_embedding_size=fields.get("mm_hidden_size", flags["patch_embedding_size"]),
            image_size=size,
            teacher_size=teacher_size,
            teacher_hidden_size=teacher_width,
            tap_interval=PUBLISHED_TAP_INTERVAL,
            patch_aligning=aligning,
        )

    def import_fingerprint(self, flags: Flags) -> dict[str, Any] | None:
        """See `HFFormat.import_fingerprint`: the teacher's."""
        if not flags["teacher_model"]:
            return None
        from megatron_eve.models.eve.teacher import teacher_fingerprint

        return teacher_fingerprint(flags["teacher_model"])

    # --- export ---

    def add_export_flags(self, parser: argparse.ArgumentParser) -> None:
        """See `HFFormat.add_export_flags`."""
        parser.add_argument(
            "--teacher-model",
            type=Path,
            metavar="DIR",
            help="folder of the teacher (CLIP): export it and the patch aligning layer, too, for training on with the "
            "published code (default: neither is exported; inference does not need them)",
        )

    def check_export_flags(self, published: bool, flags: Flags) -> Iterator[str]:
        """See `HFFormat.check_export_flags`."""
        if not published and flags["teacher_model"]:
            yield "--format transformers: it is for inference; leave --teacher-model out"

    def check_export(self, config: RunConfig, published: bool, flags: Flags) -> Iterator[str]:
        """See `HFFormat.check_export`."""
        vision: EVEConfig = config.vision
        # The layout has no field for it: another number would load and compute something else.
        heads, layout_heads = vision.patch_embedding_heads, EVEConfig.patch_embedding_heads
        if heads != layout_heads:
            yield (
                f"the patch embedding of this checkpoint has {heads} heads, and that of the published layout always "
                f"has {layout_heads}: it cannot be exported"
            )
        if flags.get("teacher_model") is None:
            return
        if not vision.patch_aligning:
            yield "--teacher-model: this checkpoint has no aligning layer; leave the teacher out"
        if vision.tap_interval != PUBLISHED_TAP_INTERVAL:
            yield (
                f"--teacher-model: the published layout taps every {PUBLISHED_TAP_INTERVAL} layers, this checkpoint "
                f"every {vision.tap_interval}; leave the teacher out"
            )

    def export_settings(self, vision: EVEConfig, flags: Flags) -> EVEConfig:
        """See `HFFormat.export_settings`: the aligning layer goes with the teacher."""
        return replace(vision, patch_aligning=flags.get("teacher_model") is not None)

    def copied_tensors(
        self, config: RunConfig, frozen: Mapping[str, Any] | None, published: bool, flags: Flags
    ) -> CopiedTensors | None:
        """See `HFFormat.copied_tensors`: the teacher, without CLIP's text side and a buffer of older versions."""
        teacher = flags.get("teacher_model")
        if teacher is None:
            return None
        from megatron_eve.models.hf_folder import HFFolder

        keys = sorted(filter(_TEACHER_KEYS.fullmatch, HFFolder(teacher).keys()))
        if not keys:
            raise ConfigError(
                f"{teacher}: holds no vision_model, so it is no CLIP; name CLIP ViT-L/14-336's folder"
            )
        return CopiedTensors(
            teacher, {f"model.vision_clip.backbone.{key}": key for key in keys}, "the teacher"
        )

    def published_files(
        self, model: ModelConfig, vision: EVEConfig, dtype: str, ids: Mapping[str, int], flags: Flags
    ) -> JSONFiles:
        """See `HFFormat.published_files`."""
        teacher = flags.get("teacher_model") is not None
        return {
            "config.json": published_config(model, vision, dtype, ids, teacher),
            "preprocessor_config.json": published_preprocessor(vision),
        }

    def transformers_files(
        self, model: ModelConfig, vision: EVEConfig, dtype: str, ids: Mapping[str, int], image_token_id: int
    ) -> JSONFiles:
        """See `HFFormat.transformers_files`."""
        return transformers_files(model, vision, dtype, ids, image_token_id)

    def code(self, vision: EVEConfig) -> Sequence[Path]:
        """See `HFFormat.code`."""
        return code_files()

    def register(self) -> Mapping[str, type]:
        """See `HFFormat.register`."""
        from megatron_eve.models.eve.hf.register import register

        return register()


def _teacher_settings(flags: Flags) -> EVEConfig:
    """The settings of a run with the teacher that the flags name."""
    return EVEConfig(
        teacher_model=str(flags["teacher_model"]), teacher_trust_remote_code=flags["trust_remote_code"]
    )
