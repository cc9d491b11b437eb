"""VILA-U's folders in Hugging Face layout: see `HFFormat`. Imports no torch at its top."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.schema import ModelConfig, RunConfig
from megatron_eve.models.hf_format import (
    CopiedTensors,
    Flags,
    FolderTensors,
    HFFormat,
    JSONFiles,
    PartFolder,
    Stated,
)
from megatron_eve.models.vila_u.checks import read_tower, tower_fingerprint, tower_sizes
from megatron_eve.models.vila_u.config import PRESETS, VILAUConfig
from megatron_eve.models.vila_u.hf.config import depth_settings, field_errors, stated
from megatron_eve.models.vila_u.hf.layouts import (
    CODEBOOK_KEYS,
    DEPTH_KEYS,
    MODULES,
    PARTS,
    PROJECTOR_KEYS,
    TOWER_KEYS,
    TRANSFORMERS,
    is_published,
)
from megatron_eve.models.vila_u.hf.published import (
    TOWER_FLAG,
    depth_section,
    published_files,
    tower_of,
    tower_path,
    tower_tensors,
    with_tower_flags,
)
from megatron_eve.models.vila_u.hf.transformers_files import (
    CHAT_TEMPLATE,
    code_files,
    transformers_files,
)
from megatron_eve.models.vila_u.image_codes import IMAGE_CODES
from megatron_eve.models.vila_u.parameters import CODEBOOK, DEPTH_HEAD, PROJECTOR
from megatron_eve.runtime.command_line import whole_number

if TYPE_CHECKING:
    from megatron_eve.models.name_rules import Rule

_COPY = "a copy of the first codebook, which all depths share"
_TRAINS_TOWERS = "trains towers alone, and is not in the codes"
_DEPTH_FLAGS = ("depth_hidden_size", "depth_num_layers", "depth_num_attention_heads")


class VILAUFormat(HFFormat):
    """See `HFFormat`. Of the tower a model holds the codebook; an export takes all else from the tower's own folder."""

    title = "VILA-U"
    model_types: tuple[str, ...] = ("vila_u_llama", "megatron_vila_u")
    other_model_types: Mapping[str, str] = {
        **dict.fromkeys(
            ("rqvaesigliptransformer_model", "megatron_vila_u_tower"),
            "a vision tower alone is named by --vision-tokenizer; take the folder of a language model or a VILA-U",
        ),
    }
    run_decides: Collection[str] = ()
    chat_templates: Mapping[str, str] = {"v1": CHAT_TEMPLATE}
    optional_parts: Mapping[str, re.Pattern[str]] = {
        CODEBOOK: re.compile(re.escape(CODEBOOK_KEYS) + r"\d+\.weight"),
        PROJECTOR: re.compile(re.escape(PROJECTOR_KEYS) + ".*"),
        DEPTH_HEAD: re.compile(re.escape(DEPTH_KEYS) + ".*"),
    }
    ignored_keys: Mapping[str, str] = {
        re.escape(CODEBOOK_KEYS) + r"\d+\.(cluster_size_ema|embed_ema)": _TRAINS_TOWERS,
        re.escape(CODEBOOK_KEYS) + r"[1-9]\d*\.weight": _COPY,
        re.escape(TOWER_KEYS)
        + r"rqvaesiglip\.(?!quantizer\.).*": "of the tower, which a checkpoint does not hold: exports take it from "
        f"{TOWER_FLAG}",
    }

    # --- config.json of a folder ---

    def check_fields(self, fields: Mapping[str, Any]) -> Iterator[str]:
        """See `HFFormat.check_fields`."""
        return field_errors(fields)

    def folders(self, fields: Mapping[str, Any]) -> Mapping[str, Mapping[str, str]]:
        """See `HFFormat.folders`."""
        return PARTS if is_published(fields) else TRANSFORMERS

    def stated(self, fields: Mapping[str, Any], folder: Path) -> Sequence[Stated]:
        """See `HFFormat.stated`."""
        return stated(fields, folder)

    # --- weights ---

    def rules(self, model: ModelConfig, vision: VILAUConfig) -> Sequence[Rule]:
        """See `HFFormat.rules`."""
        from megatron_eve.models.vila_u.names import rules

        return rules(vision)

    def part_folders(self, vision: VILAUConfig) -> Sequence[PartFolder]:
        """See `HFFormat.part_folders`: the codebook is the tower's."""
        if vision.vision_tokenizer is None:
            return ()
        folder = read_tower(vision).folder
        return (PartFolder(CODEBOOK, folder, TOWER_FLAG, {"": TOWER_KEYS}),)

    def check_weights(self, vision: VILAUConfig, source: FolderTensors) -> Iterator[str]:
        """See `HFFormat.check_weights`: a folder's codebook is that of the tower which the run names."""
        if vision.vision_tokenizer is None:
            return
        from megatron_eve.models.vila_u.tower_weights import TowerWeights

        weights, keys = TowerWeights(read_tower(vision)), set(source.keys())
        for key in (f"{CODEBOOK_KEYS}{level}.weight" for level in range(vision.codebooks)):
            if key not in keys:
                continue
            if not source.tensor(key).float().equal(weights.tensor(key.removeprefix(TOWER_KEYS)).float()):
                yield (
                    f"has another codebook than the tower of {TOWER_FLAG} {vision.vision_tokenizer}; name the tower "
                    "that the model was trained with"
                )
                return

    def keeps_dtype(self, name: str) -> bool:
        """See `HFFormat.keeps_dtype`: rounded codebooks would give other codes."""
        return name.startswith(CODEBOOK_KEYS)

    def module_names(self, vision: VILAUConfig) -> Mapping[str, str]:
        """See `HFFormat.module_names`."""
        return MODULES

    # --- import ---

    def add_import_flags(self, parser: argparse.ArgumentParser) -> None:
        """See `HFFormat.add_import_flags`."""
        parser.add_argument(
            TOWER_FLAG,
            type=Path,
            metavar="DIR",
            help="folder of the tower that makes the codes, for a language model alone: vision_tower of a VILA-U, or "
            "what an import made of it. The checkpoint has its codebook, its depth transformer if there is one, and "
            "its path, from which exports take all else; of a VILA-U it has the path of its vision_tower",
        )
        IMAGE_CODES.add_flags(parser)
        published = PRESETS["vila_u_7b"].vision
        for name, what in (
            ("depth_hidden_size", "width"),
            ("depth_num_layers", "layers"),
            ("depth_num_attention_heads", "attention heads"),
        ):
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                type=whole_number(1),
                metavar="N",
                help=f"{what} of the depth transformer, where the tower's folder has none (default: "
                f"{getattr(published, name)})",
            )

    def import_settings(self, fields: Mapping[str, Any], folder: Path, flags: Flags) -> VILAUConfig:
        """See `HFFormat.import_settings`.

        Raises:
            ConfigError: a tower that is missing, or flags that say what the folder says.
        """
        alone = str(fields.get("model_type")) not in self.model_types
        if alone and flags["vision_tokenizer"] is None:
            raise ConfigError(
                f"{folder}: is a language model alone; add {TOWER_FLAG} DIR, the tower that makes the codes"
            )
        if not alone:
            return self._model_settings(fields, folder, flags)
        vision = with_tower_flags(VILAUConfig(), flags)
        tower = tower_of(vision)
        section, settings = depth_section(tower), dict[str, Any]()
        given = [name for name in _DEPTH_FLAGS if flags[name] is not None]
        if section is not None:
            if given:
                raise ConfigError(
                    f"--{given[0].replace('_', '-')}: {tower.folder} has a depth transformer, which is taken; leave "
                    "the flag out"
                )
            settings = depth_settings({"rqtransformer": section}, tower.folder / "config.json")
        else:
            published = PRESETS["vila_u_7b"].vision
            settings = {name: flags[name] or getattr(published, name) for name in _DEPTH_FLAGS}
        return VILAUConfig(
            **tower_sizes(tower),
            **settings,
            vision_tokenizer=vision.vision_tokenizer,
            siglip_config=vision.siglip_config,
        )

    def _model_settings(self, fields: Mapping[str, Any], folder: Path, flags: Flags) -> VILAUConfig:
        """Of a whole model; its tower is its own, but for a folder for transformers."""
        published = is_published(fields)
        for name in ("vision_tokenizer", *_DEPTH_FLAGS) if published else _DEPTH_FLAGS:
            if flags[name] is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')}: {folder} is a whole VILA-U, which has that; leave the flag out"
                )
        if not published and flags["vision_tokenizer"] is None:
            raise ConfigError(
                f"{folder}: a folder for transformers holds its tower without what trains that; add {TOWER_FLAG} DIR, "
                "the tower that the model was made with"
            )
        settings = {some.setting: some.value for some in stated(fields, folder)}
        if published:
            settings["vision_tokenizer"] = tower_path(folder)
        vision = with_tower_flags(VILAUConfig(**settings), flags)
        tower_of(vision)
        return vision

    def import_fingerprint(self, flags: Flags) -> dict[str, Any] | None:
        """See `HFFormat.import_fingerprint`: the tower's."""
        own = VILAUConfig(vision_tokenizer=tower_path(flags["source"]))
        return tower_fingerprint(with_tower_flags(own, flags))

    # --- export ---

    def add_export_flags(self, parser: argparse.ArgumentParser) -> None:
        """See `HFFormat.add_export_flags`."""
        parser.add_argument(
            TOWER_FLAG,
            type=Path,
            metavar="DIR",
            help="folder of the tower that made the codes of the model, whose tensors the export holds, too; another "
            "one is refused (default: the one whose path the checkpoint holds)",
        )
        IMAGE_CODES.add_flags(parser)

    def check_export_flags(self, published: bool, flags: Flags) -> Iterator[str]:
        """See `HFFormat.check_export_flags`."""
        if flags["vision_tokenizer"] is not None:
            try:
                tower_of(with_tower_flags(VILAUConfig(), flags))
            except ConfigError as error:
                yield str(error)

    def check_export(self, config: RunConfig, published: bool, flags: Flags) -> Iterator[str]:
        """See `HFFormat.check_export`: both layouts are of a Llama."""
        if config.model.add_qkv_bias:
            yield (
                f"--source {flags['source']}: its decoder is a Qwen2 (--add-qkv-bias), and folders of VILA-U hold a "
                "Llama; train and draw with the checkpoint itself"
            )

    def export_settings(self, vision: VILAUConfig, flags: Flags) -> VILAUConfig:
        """See `HFFormat.export_settings`: with the tower that the flags name."""
        return with_tower_flags(vision, flags)

    def export_folders(
        self, published: bool, vision: VILAUConfig, flags: Flags
    ) -> Mapping[str, Mapping[str, str]]:
        """See `HFFormat.export_folders`."""
        return PARTS if published else TRANSFORMERS

    def copied_tensors(
        self, config: RunConfig, frozen: Mapping[str, Any] | None, published: bool, flags: Flags
    ) -> CopiedTensors | None:
        """See `HFFormat.copied_tensors`: the tower's."""
        return tower_tensors(config.vision, frozen, published)

    def published_files(
        self, model: ModelConfig, vision: VILAUConfig, dtype: str, ids: Mapping[str, int], flags: Flags
    ) -> JSONFiles:
        """See `HFFormat.published_files`."""
        return published_files(model, vision, dtype, ids, flags)

    def transformers_files(
        self, model: ModelConfig, vision: VILAUConfig, dtype: str, ids: Mapping[str, int], image_token_id: int
    ) -> JSONFiles:
        """See `HFFormat.transformers_files`."""
        return transformers_files(model, vision, dtype, ids, image_token_id)

    def code(self, vision: VILAUConfig) -> Sequence[Path]:
        """See `HFFormat.code`."""
        return code_files()

    def register(self) -> Mapping[str, type]:
        """See `HFFormat.register`."""
        from megatron_eve.models.vila_u.hf.register import register_models

        return register_models()
