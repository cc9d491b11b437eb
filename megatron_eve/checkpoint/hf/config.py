"""`config.json` of a model folder in Hugging Face layout: sizes of the decoder, and the model family."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_eve.config import ConfigError, ModelConfig
from megatron_eve.models.family import ModelFamily, ModelSettings
from megatron_eve.models.registry import DEFAULT_FAMILY, find_family, loaded_families
from megatron_eve.models.rope_scaling import (
    adds_linear_scaling,
    read_scaling,
    rope_entries,
    scaling_difference,
)
from megatron_eve.runtime.wrong_content import wrong_content

if TYPE_CHECKING:
    from megatron_eve.data.text.text_tokenizer import TextTokenizer

# config.json (transformers' Llama and Qwen2, and families on top of them) against our names.
LANGUAGE_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_epsilon",
    "max_position_embeddings": "max_position_embeddings",
}
# Numbers above 0 where they are stated.
_OPTIONAL = ("num_key_value_heads", "head_dim")
_FULL = "attention has no sliding window here; take a model with full attention in every layer"
# Fields that must have certain values for the decoder to compute the same: field, allowed values, error message.
_MUST_BE: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": ((None, "silu", "swish"), "the decoder's MLP is gated by SiLU"),
    "attention_bias": ((None, False), "attention has no biases here but Qwen2's, of query, key and value"),
    "mlp_bias": ((None, False), "the MLP has no biases here"),
    "partial_rotary_factor": ((None, 1), "rotary embeddings are of the whole head here"),
    "use_sliding_window": ((None, False), _FULL),
    "quantization_config": ((None,), "quantised weights cannot be trained; take the original ones"),
}
# Model types of language models alone, and what messages call them.
_LANGUAGE_MODELS = {"llama": "Llama", "qwen2": "Qwen2"}


@dataclass(frozen=True)
class HFConfig:
    """A folder's config.json.

    Attributes:
        fields: its contents.
        source: its path, for messages.
        family: whose folder it is; None for a language model alone.
        folders: in which its weights lie (`HFFormat.folders`).
        language: what is said of the language model: the same file, unless that has a section or a folder of its own.
    """

    fields: dict[str, Any]
    source: Path
    family: ModelFamily | None
    folders: Mapping[str, Mapping[str, str]]
    language: Mapping[str, Any]

    @staticmethod
    def read(folder: Path) -> HFConfig:
        """Read and check it.

        Raises:
            ConfigError: no config.json, or one of a model that this decoder cannot compute.
        """
        path = folder / "config.json"
        refuse_adapter(folder, str(folder))
        fields = _read_fields(path)
        family = _family_of(fields, path)
        if family is None:
            found = HFConfig(fields, path, None, {".": {}}, fields)
        else:
            its = family.hugging_face()
            for problem in its.check_fields(fields):
                raise ConfigError(f"{path}: {problem}")
            found = HFConfig(fields, path, family, its.folders(fields), its.language_fields(fields) or fields)
        language = found._language_file
        if language != path:
            found = replace(found, language=_read_fields(language))
        if found.language is not fields:
            kind = found.language.get("model_type")
            if kind not in _LANGUAGE_MODELS:
                known = " and ".join(_LANGUAGE_MODELS.values())
                raise ConfigError(f"{language}: model_type is {kind!r}, and {known} are known here")
        _check_language(found.language, language)
        _check_sizes(fields, path, optional=family.hugging_face().fields if family else ())
        read_scaling(found.language, language)
        theta = found.rope_theta
        if not isinstance(theta, int | float) or not 1 <= theta < 2**63 or int(theta) != theta:
            raise ConfigError(f"{language}: rope_theta is {theta!r}, and a whole number from 1 on is needed")
        return found

    @property
    def language_folder(self) -> Path:
        """Where the language model lies, with its tokenizer."""
        return self.source.parent / next(iter(self.folders))

    @property
    def _language_file(self) -> Path:
        return self.language_folder / "config.json"

    @property
    def has_qkv_bias(self) -> bool:
        """Have query, key and value biases? All of Qwen2's, and those of a family's model that says so (`qkv_bias`)."""
        fields = self.language
        of_family = self.family is not None and self.family.hugging_face().qkv_bias
        return bool(fields["model_type"] == "qwen2" or of_family or (self.family and fields.get("qkv_bias")))

    @property
    def has_experts(self) -> bool:
        """Has the decoder experts for rows of images?"""
        return self.family is not None and self.family.hugging_face().has_experts(self.fields)

    @property
    def is_tied(self) -> bool:
        """Are the embedding and the output layer one matrix? No, where the file does not say."""
        return bool(self.language.get("tie_word_embeddings"))

    @property
    def rope_theta(self) -> float:
        """Base of the rotary embedding, which transformers 5 keeps beside the kind of scaling."""
        stated = [some.get("rope_theta") for _, some in rope_entries(self.language, self._language_file)]
        return next((theta for theta in stated if theta), None) or (
            self.language.get("rope_theta") or ModelConfig.rotary_base
        )

    def model_config(self) -> ModelConfig:
        """Sizes of our decoder."""
        fields = self.language
        values = {ours: fields[theirs] for theirs, ours in LANGUAGE_FIELDS.items()}
        groups = fields.get("num_key_value_heads") or fields["num_attention_heads"]
        return ModelConfig(
            **values,
            num_query_groups=None if groups == fields["num_attention_heads"] else groups,
            add_qkv_bias=self.has_qkv_bias,
            modality_experts=self.has_experts,
            rotary_base=int(self.rope_theta),
            **read_scaling(fields, self._language_file),
        )


def refuse_adapter(folder: Path, name: str, save: str = "save_pretrained") -> None:
    """Raise ConfigError for a folder that holds an adapter of PEFT and no model.

    Args:
        folder: in Hugging Face layout.
        name: of the folder in the message.
        save: how the merged model is saved, for the remedy.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{name}: holds an adapter of PEFT and no model; merge it into its model (merge_and_unload, then {save}), "
            "and name that folder, or put it on its model (tools/convert_checkpoint.py import --source MODEL --adapter "
            "ADAPTER), and name what that writes"
        )


class FolderSettings(NamedTuple):
    """What a folder says of its model (`ModelSettings`)."""

    family: str
    model: ModelConfig
    vision: Any


def settings_of(folder: Path, **vision: Any) -> FolderSettings:
    """The sizes of the model that a folder holds; of the default family, where it holds a language model alone.

    Args:
        folder: with a config.json.
        vision: settings of the family that the folder does not state, or states otherwise.

    Raises:
        ConfigError: see `HFConfig.read`.
    """
    config = HFConfig.read(folder)
    family = config.family or find_family(DEFAULT_FAMILY)
    stated = family.hugging_face().stated(config.fields, folder) if config.family else ()
    settings = {some.setting: some.value for some in stated} | vision
    return FolderSettings(family.name, config.model_config(), family.Config(**settings))


def check_config(folder: Path, settings: ModelSettings) -> HFConfig:
    """Read config.json of a folder in Hugging Face layout and compare its sizes with the run's.

    Raises:
        ConfigError: it cannot be read, is of another family, or has other sizes.
    """
    config = HFConfig.read(folder)
    family = find_family(settings.family)
    if config.family not in (None, family):
        raise ConfigError(
            f"{config.source}: it is of {config.family.hugging_face().title}, and this run trains the family "
            f"{family.name}; use a folder of that, or --family {config.family.name}"
        )
    theirs, model = config.model_config(), settings.model
    names = {**LANGUAGE_FIELDS, "rope_theta": "rotary_base", "qkv_bias": "add_qkv_bias"}
    # The run decides how long samples may be.
    pairs = {
        name: (ours, getattr(theirs, ours), getattr(model, ours))
        for name, ours in names.items()
        if ours != "max_position_embeddings"
    }
    if added_rows(config, theirs, family, model):
        del pairs["vocab_size"]
    its = family.hugging_face()
    for some in its.stated(config.fields, folder) if config.family else ():
        if some.setting not in its.run_decides and not some.assumed:
            pairs[some.field] = some.setting, some.value, getattr(settings.vision, some.setting)
    for name, (ours, there, here) in pairs.items():
        if there != here:
            raise ConfigError(
                f"{config.source}: {name} is {there}, this run has --{ours.replace('_', '-')} {here}; use the preset "
                "or recipe of that model"
            )
    if theirs.modality_experts and not model.modality_experts:
        raise ConfigError(
            f"{config.source}: is of a model with experts, and this run has none; add --modality-experts"
        )
    here, there = (some.num_query_groups or some.num_attention_heads for some in (model, theirs))
    if here != there:
        raise ConfigError(
            f"{config.source}: num_key_value_heads is {there}, this run has --num-query-groups {here}; use the preset "
            "or recipe of that model"
        )
    difference = scaling_difference(theirs, model)
    if difference and not adds_linear_scaling(theirs, model):
        raise ConfigError(
            f"{config.source}: {difference}; use the preset or recipe of that model, or its flags"
        )
    return config


def added_rows(config: HFConfig, theirs: ModelConfig, family: ModelFamily, model: ModelConfig) -> int:
    """Rows of the vocabulary that a run adds to a language model, for the family's control tokens; 0 where it has them.

    Args:
        config: of the folder.
        theirs: sizes of its decoder.
        family, model: of the run.
    """
    added = len(family.text_rules.added_tokens)
    return added if config.family is None and theirs.vocab_size + added == model.vocab_size else 0


def _family_of(fields: dict[str, Any], path: Path) -> ModelFamily | None:
    """The family of the model that config.json describes; None for a language model alone.

    Raises:
        ConfigError: neither a family's nor that of a known language model.
    """
    kind = fields.get("model_type")
    known, meanings = list(_LANGUAGE_MODELS.values()), list[str]()
    if str(kind) in _LANGUAGE_MODELS:
        return None
    for family in loaded_families():
        its = family.hugging_face()
        if str(kind) in its.model_types:
            return family
        known.append(its.title)
        if (meaning := its.other_model_types.get(str(kind))) is not None:
            meanings.append(meaning)
    of_none = f"{', '.join(known[:-1])} and {known[-1]} are known; take a folder of one of these"
    raise ConfigError(f"{path}: model_type is {kind!r}, and {'; or '.join(meanings) or of_none}")


def _read_fields(path: Path) -> dict[str, Any]:
    """What a config.json holds.

    Raises:
        ConfigError: it is not there, or holds no settings by name.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a model folder in Hugging Face layout") from None
    except ValueError as error:
        other = wrong_content(path)
        problem = f"; it {other}" if other else f" ({error}); copy the folder again"
        raise ConfigError(f"{path}: not JSON{problem}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: holds no settings by name; copy the folder again")
    return fields


def _check_language(fields: Mapping[str, Any], path: Path) -> None:
    """Refuse a language model that the decoder cannot compute, but for its rotary embedding."""
    for name, (allowed, meaning) in _MUST_BE.items():
        if fields.get(name) not in allowed:
            raise ConfigError(f"{path}: {name} is {fields.get(name)!r}, and {meaning}")
    kinds = fields.get("layer_types") or []
    windowed = {str(kind) for kind in kinds} - {"full_attention"} if isinstance(kinds, list) else {str(kinds)}
    if windowed:
        raise ConfigError(f"{path}: layer_types has {', '.join(sorted(windowed))!r}, and {_FULL}")
    _check_sizes(fields, path, LANGUAGE_FIELDS, _OPTIONAL)
    head = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    if head * fields["num_attention_heads"] != fields["hidden_size"]:
        raise ConfigError(
            f"{path}: head_dim is {head}, and heads are hidden_size / num_attention_heads wide here"
        )


def _check_sizes(
    fields: Mapping[str, Any], path: Path, wanted: Collection[str] = (), optional: Collection[str] = ()
) -> None:
    """Refuse a configuration that lacks a size, or states an optional one that is none."""
    missing = [name for name in wanted if not _is_positive(fields.get(name), name)]
    missing += [name for name in optional if fields.get(name) and not _is_positive(fields[name], name)]
    if missing:
        raise ConfigError(
            f"{path}: has no {', '.join(missing)} above 0; this is not a whole model's configuration"
        )


def _is_positive(value: object, name: str) -> bool:
    kinds = int | float if name == "rms_norm_eps" else int
    return isinstance(value, kinds) and not isinstance(value, bool) and value > 0


def token_ids(tokenizer: TextTokenizer | None) -> dict[str, int]:
    """The control tokens of config.json and generation_config.json; Llama's where no tokenizer is known."""
    from megatron_eve.data.text.tokenizer import Tokenizer

    if tokenizer is None:
        return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    bos = {} if tokenizer.bos_id is None else {"bos_token_id": tokenizer.bos_id}
    # The padding token of Llama's sentencepiece tokenizers is the unknown one.
    pad = tokenizer.unk_id if isinstance(tokenizer, Tokenizer) else tokenizer.eos_id
    return {**bos, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad}
