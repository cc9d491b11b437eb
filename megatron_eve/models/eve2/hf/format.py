"""EVE v2's folders in Hugging Face layout: see `HFFormat`. Imports no torch at its top."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.chat_templates import vicuna_chat_template
from megatron_eve.models.eve2.config import EVE2Config
from megatron_eve.models.eve2.hf.config import (
    MODEL_TYPE,
    code_files,
    field_errors,
    has_experts,
    published_files,
    stated,
    transformers_files,
)
from megatron_eve.models.eve2.templates import EVE2_QWEN2
from megatron_eve.models.hf_format import Flags, HFFormat, JSONFiles, Stated
from megatron_eve.runtime.command_line import whole_number

if TYPE_CHECKING:
    from megatron_eve.models.name_rules import Rule


class EVE2Format(HFFormat):
    """See `HFFormat`."""

    title = "EVE v2"
    model_types: tuple[str, ...] = (MODEL_TYPE,)
    fields: Mapping[str, str] = {"mm_hidden_size": "patch_embedding_size"}
    run_decides: Collection[str] = ("max_image_side", "image_resize")
    qkv_bias = True
    chat_templates: Mapping[str, str] = {EVE2_QWEN2.name: vicuna_chat_template("", "<|im_end|>")}

    def check_fields(self, fields: Mapping[str, Any]) -> Iterator[str]:
        """See `HFFormat.check_fields`."""
        return field_errors(fields)

    def has_experts(self, fields: Mapping[str, Any]) -> bool:
        """See `HFFormat.has_experts`."""
        return has_experts(fields)

    def stated(self, fields: Mapping[str, Any], folder: Path) -> Sequence[Stated]:
        """See `HFFormat.stated`."""
        return list(stated(fields, folder))

    def rules(self, model: ModelConfig, vision: EVE2Config) -> Sequence[Rule]:
        """See `HFFormat.rules`."""
        from megatron_eve.models.eve2.names import RULES

        return RULES

    # --- import ---

    def add_import_flags(self, parser: argparse.ArgumentParser) -> None:
        """See `HFFormat.add_import_flags`."""
        parser.add_argument(
            "--max-image-side",
            type=whole_number(1),
            metavar="PX",
            help="pixels of an image, as the side of a square of as many (default: as the folder says, or 800)",
        )
        parser.add_argument(
            "--patch-embedding-size",
            type=whole_number(1),
            default=1024,
            metavar="N",
            help="width of the patch embedding layer that a language model gets",
        )

        parser.add_argument(
            "--modality-experts",
            action="store_true",
            help="give a model without experts (a language model, or that of stage 0) some, as copies of its weights; "
            "a run that starts from it with --modality-experts does the same",
        )

    def adds_experts(self, flags: Flags) -> bool:
        """See `HFFormat.adds_experts`."""
        return bool(flags["modality_experts"])

    def import_settings(self, fields: Mapping[str, Any], folder: Path, flags: Flags) -> EVE2Config:
        """See `HFFormat.import_settings`."""
        found = {"patch_embedding_size": flags["patch_embedding_size"], "max_image_side": 800}
        found |= {some.setting: some.value for some in stated(fields, folder)}
        if flags["max_image_side"] is not None:
            found["max_image_side"] = flags["max_image_side"]
        return EVE2Config(**found)

    # --- export ---

    def published_files(
        self, model: ModelConfig, vision: EVE2Config, dtype: str, ids: Mapping[str, int], flags: Flags
    ) -> JSONFiles:
        """See `HFFormat.published_files`."""
        return published_files(model, vision, dtype, ids)

    def transformers_files(
        self, model: ModelConfig, vision: EVE2Config, dtype: str, ids: Mapping[str, int], image_token_id: int
    ) -> JSONFiles:
        """See `HFFormat.transformers_files`."""
        return transformers_files(model, vision, dtype, ids, image_token_id)

    def code(self, vision: EVE2Config) -> Sequence[Path]:
        """See `HFFormat.code`."""
        return code_files()

    def register(self) -> Mapping[str, type]:
        """See `HFFormat.register`."""
        from megatron_eve.models.eve2.hf.register import register

        return register()
