"""The toy's folders in Hugging Face layout: names of tensors and config.json. Imports no torch at its top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.hf_format import Flags, HFFormat, JSONFiles
from tests.families.toy.config import ToyConfig

if TYPE_CHECKING:
    from pathlib import Path

    from megatron_eve.models.name_rules import Rule


class ToyFormat(HFFormat):
    """A Llama of transformers with two small matrices beside it."""

    title = "the toy"
    model_types: tuple[str, ...] = ("toy",)
    fields: Mapping[str, str] = {
        "toy_image_size": "toy_image_size",
        "toy_patch_size": "toy_patch_size",
    }

    def rules(self, model: ModelConfig, vision: ToyConfig) -> Sequence[Rule]:
        """See `HFFormat.rules`: ours, and theirs."""
        from megatron_eve.models.name_rules import Rule
        from megatron_eve.models.tensor_layouts import Replicated

        return (
            Rule("vision_model.projection.*", ("model.front_end.*",), Replicated()),
            Rule("colour_head.projection.*", ("model.colour_head.*",), Replicated()),
        )

    def import_settings(self, fields: Mapping[str, Any], folder: Path, flags: Flags) -> ToyConfig:
        """See `HFFormat.import_settings`."""
        return ToyConfig(**{name: fields[name] for name in self.fields if name in fields})

    def published_files(
        self, model: ModelConfig, vision: ToyConfig, dtype: str, ids: Mapping[str, int], flags: Flags
    ) -> JSONFiles:
        """See `HFFormat.published_files`."""
        config = {
            "model_type": "toy",
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_hidden_size,
            "max_position_embeddings": model.max_position_embeddings,
            "num_attention_heads": model.num_attention_heads,
            "num_hidden_layers": model.num_layers,
            "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
            "rms_norm_eps": model.norm_epsilon,
            "torch_dtype": dtype,
            "vocab_size": model.vocab_size,
            **{name: getattr(vision, name) for name in self.fields},
            **ids,
        }
        return {"config.json": config}
