"""VILA's folders in Hugging Face layout: see `HFFormat`. Imports no torch at its top."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from megatron_eve.config.schema import ModelConfig, RunConfig
from megatron_eve.models.hf_format import Flags, FolderTensors, HFFormat, JSONFiles, PartFolder, Stated
from megatron_eve.models.vila.config import ProjectorType, VILAConfig
from megatron_eve.models.vila.hf.chat_templates import CHAT_TEMPLATES
from megatron_eve.models.vila.hf.config import field_errors, language_fields, stated
from megatron_eve.models.vila.hf.layouts import (
    FLAT,
    LLAVA,
    LLAVA_MODULES,
    OWN_CODE,
    OWN_CODE_MODULES,
    PARTS,
    PROJECTOR_KEYS,
    TOWER_FOLDER,
    TOWER_KEYS,
    folders_of,
)
from megatron_eve.models.vila.hf.llava import code_files, is_llava, rows_of, transformers_files
from megatron_eve.models.vila.hf.published import flat_files, part_files
from megatron_eve.models.vila.hf.tower import folder_settings
from megatron_eve.runtime.command_line import whole_number

if TYPE_CHECKING:
    from megatron_eve.models.name_rules import Rule

_FLAT_PROJECTORS = ("linear", "mlp2x_gelu", "mlp3x_gelu")
_TOWER_ALONE = (
    "a vision tower alone is named by --vision-tower; take the folder of a language model or a VILA"
)
_OTHER_DECODER = "the decoder is a Llama or a Qwen2 here; take a VILA or LLaVA-1.5 on one of these"


class VILAFormat(HFFormat):
    """See `HFFormat`."""

    title = "VILA"
    model_types: tuple[str, ...] = ("llava_llama", "llava", "megatron_vila")
    other_model_types: Mapping[str, str] = {
        **dict.fromkeys(("llava_mistral", "llava_mixtral", "llava_gemma", "llava_mpt"), _OTHER_DECODER),
        **dict.fromkeys(
            ("llava_next", "llava_onevision"),
            "pictures are cut into tiles as NVILA's here and not as these; take LLaVA-1.5 or a VILA",
        ),
        **dict.fromkeys(("clip", "clip_vision_model", "siglip", "siglip_vision_model"), _TOWER_ALONE),
    }
    fields: Mapping[str, str] = {"qformer_num_queries": "qformer_num_queries"}
    run_decides: Collection[str] = ("image_fit", "max_tiles")
    optional_parts: Mapping[str, re.Pattern[str]] = {"vision tower": re.compile(re.escape(TOWER_KEYS) + ".*")}
    ignored_keys: Mapping[str, str] = {
        re.escape(TOWER_KEYS) + r"embeddings\.position_ids": "a buffer that is computed"
    }

    chat_templates: Mapping[str, str] = CHAT_TEMPLATES

    # --- config.json of a folder ---

    def check_fields(self, fields: Mapping[str, Any]) -> Iterator[str]:
        """See `HFFormat.check_fields`."""
        return field_errors(fields)

    def folders(self, fields: Mapping[str, Any]) -> Mapping[str, Mapping[str, str]]:
        """See `HFFormat.folders`."""
        return folders_of(fields)

    def language_fields(self, fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """See `HFFormat.language_fields`."""
        return language_fields(fields)

    def stated(self, fields: Mapping[str, Any], folder: Path) -> Sequence[Stated]:
        """See `HFFormat.stated`."""
        return stated(fields, folder)

    # --- weights ---

    def rules(self, model: ModelConfig, vision: VILAConfig) -> Sequence[Rule]:
        """See `HFFormat.rules`."""
        from megatron_eve.models.vila.names import rules

        return rules(vision.projector_type)

    def part_folders(self, vision: VILAConfig) -> Sequence[PartFolder]:
        """See `HFFormat.part_folders`: the tower's, which published folders may lack."""
        if vision.vision_tower is None:
            return ()
        return (PartFolder("vision tower", Path(vision.vision_tower), "--vision-tower", TOWER_FOLDER),)

    def check_weights(self, vision: VILAConfig, source: FolderTensors) -> Iterator[str]:
        """See `HFFormat.check_weights`: a model whose tower is elsewhere cannot begin with a random one."""
        keys = list(source.keys())
        held = {
            prefix: any(key.startswith(prefix) for key in keys) for prefix in (PROJECTOR_KEYS, TOWER_KEYS)
        }
        if held[PROJECTOR_KEYS] and not held[TOWER_KEYS]:
            yield "holds no vision tower; name the folder of the one that it was trained with by --vision-tower"

    def module_names(self, vision: VILAConfig) -> Mapping[str, str]:
        """See `HFFormat.module_names`."""
        return LLAVA_MODULES if is_llava(vision) else OWN_CODE_MODULES

    # --- import ---

    def add_import_flags(self, parser: argparse.ArgumentParser) -> None:
        """See `HFFormat.add_import_flags`."""
        parser.add_argument(
            "--vision-tower",
            metavar="DIR",
            help="folder of the vision tower (CLIP or SigLIP, whole or its vision side), where --source lacks it: a "
            "language model, and a VILA 1.0 or LLaVA-1.5 that names a tower on the hub",
        )
        parser.add_argument(
            "--projector-type",
            choices=get_args(ProjectorType),
            help="projector that a language model gets, with random weights (default: mlp2x_gelu)",
        )
        parser.add_argument(
            "--qformer-num-queries",
            type=whole_number(1),
            metavar="N",
            help="learned queries of --projector-type qformer, and so rows of a picture (default: 64)",
        )
        parser.add_argument(
            "--vision-select-layer",
            type=int,
            metavar="N",
            help="hidden state of the tower that goes to the projector of a language model (default: -2)",
        )
        parser.add_argument(
            "--image-fit",
            choices=("pad", "crop", "stretch", "tiles"),
            help="how a picture becomes a square, or several: tiles (default: as the folder says; of a language model: "
            "pad)",
        )

    def import_settings(self, fields: Mapping[str, Any], folder: Path, flags: Flags) -> VILAConfig:
        """See `HFFormat.import_settings`.

        Raises:
            ConfigError: a tower that is not known, or settings of a model that the folder states otherwise.
        """
        from megatron_eve.config.errors import ConfigError

        of_language_model = str(fields.get("model_type")) not in self.model_types
        found = [] if of_language_model else list(stated(fields, folder))
        tower = flags["vision_tower"]
        if tower is not None:
            given = folder_settings(Path(tower), "--vision-tower")
            names = {some.setting for some in given}
            found = [*(some for some in found if some.setting not in names), *given]
        settings = {some.setting: some.value for some in found}
        if "vision_hidden_size" not in settings:
            what = (
                "a language model alone" if of_language_model else "a model whose vision tower is not there"
            )
            raise ConfigError(f"{folder}: is {what}; add --vision-tower DIR, the folder of a CLIP or SigLIP")
        for name in ("projector_type", "vision_select_layer", "qformer_num_queries"):
            if flags[name] is None:
                continue
            flag = f"--{name.replace('_', '-')} {flags[name]}"
            if name == "qformer_num_queries" and settings.get("projector_type") != "qformer":
                raise ConfigError(f"{flag}: is for --projector-type qformer; add that, or leave it out")
            if not of_language_model and flags[name] != settings[name]:
                raise ConfigError(
                    f"{flag}: --source {folder} has {settings[name]}; leave the flag out, which is for a language "
                    "model alone"
                )
            settings[name] = flags[name]
        if flags["image_fit"] is not None:
            settings["image_fit"] = flags["image_fit"]
        return VILAConfig(**settings, vision_tower=tower)

    # --- export ---

    def add_export_flags(self, parser: argparse.ArgumentParser) -> None:
        """See `HFFormat.add_export_flags`."""
        parser.add_argument(
            "--published-layout",
            choices=("vila1.0", "vila1.5"),
            help="which published layout: one folder (vila1.0), or llm/, vision_tower/ and mm_projector/ (vila1.5, and "
            "NVILA) (default: vila1.0 for a CLIP with a projector that VILA 1.0 has, else vila1.5)",
        )
        parser.add_argument(
            "--conv-mode",
            choices=tuple(CHAT_TEMPLATES),
            help="template that the model's conversations were made with, for chat_template.jinja of --format "
            "transformers (default: vila_v1)",
        )

    def check_export_flags(self, published: bool, flags: Flags) -> Iterator[str]:
        """See `HFFormat.check_export_flags`."""
        if not published and flags["published_layout"]:
            yield "--published-layout: is for --format published; leave it out"
        if published and flags["conv_mode"]:
            yield "--conv-mode: is for --format transformers; leave it out"

    def check_export(self, config: RunConfig, published: bool, flags: Flags) -> Iterator[str]:
        """See `HFFormat.check_export`."""
        projector = config.vision.projector_type
        if not published:
            if config.vision.image_fit == "tiles":
                yield (
                    "--format transformers: its processor cuts no pictures into tiles (--image-fit tiles); use "
                    "--format published"
                )
        elif projector == "qformer":
            yield "a projector of type qformer is in no published layout; use --format transformers"
        elif config.vision.image_fit == "tiles" and _is_flat(config.vision, flags):
            yield "--image-fit tiles: pictures in tiles are in no VILA 1.0; add --published-layout vila1.5"
        elif flags.get("published_layout") == "vila1.0" and projector not in _FLAT_PROJECTORS:
            yield (f"--published-layout vila1.0: VILA 1.0 has no projector of type {projector}; use vila1.5")

    def export_folders(
        self, published: bool, vision: VILAConfig, flags: Flags
    ) -> Mapping[str, Mapping[str, str]]:
        """See `HFFormat.export_folders`."""
        if not published:
            return LLAVA if is_llava(vision) else OWN_CODE
        return FLAT if _is_flat(vision, flags) else PARTS

    def published_files(
        self, model: ModelConfig, vision: VILAConfig, dtype: str, ids: Mapping[str, int], flags: Flags
    ) -> JSONFiles:
        """See `HFFormat.published_files`."""
        files = flat_files if _is_flat(vision, flags) else part_files
        return files(model, vision, dtype, ids)

    def chat_template(self, flags: Flags) -> str | None:
        """See `HFFormat.chat_template`."""
        named: str | None = flags.get("conv_mode")
        return named

    def rows(self, model: ModelConfig, image_token_id: int) -> int:
        """See `HFFormat.rows`."""
        return rows_of(model, image_token_id)

    def transformers_files(
        self, model: ModelConfig, vision: VILAConfig, dtype: str, ids: Mapping[str, int], image_token_id: int
    ) -> JSONFiles:
        """See `HFFormat.transformers_files`."""
        return transformers_files(model, vision, dtype, ids, image_token_id)

    def code(self, vision: VILAConfig) -> Sequence[Path]:
        """See `HFFormat.code`."""
        return code_files(vision)

    def register(self) -> Mapping[str, type]:
        """See `HFFormat.register`."""
        from megatron_eve.models.vila.hf.register import register

        return register()


def _is_flat(vision: VILAConfig, flags: Flags) -> bool:
    """Is an export in VILA 1.0's layout?"""
    layout = flags.get("published_layout")
    if layout is not None:
        return bool(layout == "vila1.0")
    return vision.vision_model_type == "clip" and vision.projector_type in _FLAT_PROJECTORS
