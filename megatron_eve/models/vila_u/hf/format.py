"""VILA-U's folders in Hugging Face layout: see `HFFormat`. Imports no torch at its top."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.hf_format import Flags, HFFormat, JSONFiles, PartFolder, Stated
from megatron_eve.models.vila_u.config import VILAUConfig
from megatron_eve.models.vila_u.hf.config import field_errors, stated
from megatron_eve.models.vila_u.hf.layouts import CODEBOOK_KEYS, DEPTH_KEYS, PARTS, PROJECTOR_KEYS, TOWER_KEYS
from megatron_eve.models.vila_u.parameters import CODEBOOK, DEPTH_HEAD, PROJECTOR

if TYPE_CHECKING:
    from megatron_eve.models.name_rules import Rule

_COPY = "a copy of the first codebook, which all depths share"
_TRAINS_TOWERS = "trains towers alone, and is not in the codes"


class VILAUFormat(HFFormat):
    """See `HFFormat`. Of the tower a model holds the codebook; what else is in its folder belongs to the tower."""

    title = "VILA-U"
    model_types: tuple[str, ...] = ("vila_u_llama",)
    other_model_types: Mapping[str, str] = {
        "rqvaesigliptransformer_model": "a vision tower alone is named by --vision-tokenizer; take the folder of a "
        "language model or a VILA-U",
    }
    run_decides: Collection[str] = ()
    optional_parts: Mapping[str, re.Pattern[str]] = {
        CODEBOOK: re.compile(re.escape(CODEBOOK_KEYS) + r"\d+\.weight"),
        PROJECTOR: re.compile(re.escape(PROJECTOR_KEYS) + ".*"),
        DEPTH_HEAD: re.compile(re.escape(DEPTH_KEYS) + ".*"),
    }
    ignored_keys: Mapping[str, str] = {
        re.escape(CODEBOOK_KEYS) + r"\d+\.(cluster_size_ema|embed_ema)": _TRAINS_TOWERS,
        re.escape(CODEBOOK_KEYS) + r"[1-9]\d*\.weight": _COPY,
        re.escape(TOWER_KEYS)
        + r"rqvaesiglip\.(?!quantizer\.).*": "of the tower, which a model does not hold",
    }

    # --- config.json of a folder ---

    def check_fields(self, fields: Mapping[str, Any]) -> Iterator[str]:
        """See `HFFormat.check_fields`."""
        return field_errors(fields)

    def folders(self, fields: Mapping[str, Any]) -> Mapping[str, Mapping[str, str]]:
        """See `HFFormat.folders`."""
        return PARTS

    def stated(self, fields: Mapping[str, Any], folder: Path) -> Sequence[Stated]:
        """See `HFFormat.stated`."""
        return stated(folder)

    # --- weights ---

    def rules(self, model: ModelConfig, vision: VILAUConfig) -> Sequence[Rule]:
        """See `HFFormat.rules`."""
        from megatron_eve.models.vila_u.names import rules

        return rules(vision)

    def part_folders(self, vision: VILAUConfig) -> Sequence[PartFolder]:
        """See `HFFormat.part_folders`: the codebook is the tower's."""
        if vision.vision_tokenizer is None:
            return ()
        from megatron_eve.models.vila_u.checks import read_tower

        folder = read_tower(vision).folder
        return (PartFolder(CODEBOOK, folder, "--vision-tokenizer", {"": TOWER_KEYS}),)

    # --- import and export ---

    def import_settings(self, fields: Mapping[str, Any], folder: Path, flags: Flags) -> VILAUConfig:
        """See `HFFormat.import_settings`."""
        raise ConfigError(
            f"{folder}: whole models of VILA-U are not converted yet; name its vision_tower for that alone, or "
            "start a run from the model with --pretrained-checkpoint"
        )

    def check_export(self, config: Any, published: bool, flags: Flags) -> Iterator[str]:
        """See `HFFormat.check_export`."""
        yield "--family vila_u: whole models of VILA-U are not exported yet"

    def published_files(
        self, model: ModelConfig, vision: VILAUConfig, dtype: str, ids: Mapping[str, int], flags: Flags
    ) -> JSONFiles:
        """See `HFFormat.published_files`."""
        raise NotImplementedError("refused by `check_export`")

    def transformers_files(
        self, model: ModelConfig, vision: VILAUConfig, dtype: str, ids: Mapping[str, int], image_token_id: int
    ) -> JSONFiles:
        """See `HFFormat.transformers_files`."""
        raise NotImplementedError("refused by `check_export`")
