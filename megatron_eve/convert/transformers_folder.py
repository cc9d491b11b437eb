"""What a model folder holds beside its weights so that today's transformers loads it by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_eve.checkpoint.hf.config import token_ids
from megatron_eve.config import ConfigError, ModelConfig
from megatron_eve.convert.fast_tokenizer import fast_tokenizer
from megatron_eve.data.text.chat_template import DATE_MACRO, chat_template_sha256, read_chat_template
from megatron_eve.data.text.text_tokenizer import TOKENIZERS, TextTokenizer
from megatron_eve.models.chat_templates import (
    CHATML_CHAT_TEMPLATE,
    chat_template_with_pictures,
    is_with_pictures,
    vicuna_chat_template,
)
from megatron_eve.models.family import ModelSettings
from megatron_eve.models.hf_format import Flags
from megatron_eve.models.registry import find_family, loaded_families
from megatron_eve.models.text_format import CHAT_TEMPLATE, CHATML

# By template, as `data/text/conversation.py` writes it. "plain" has no turns. The text begins with the BOS token, as
# templates of transformers do: its tokenizers add none to it, nor does TRL.
_CHAT_TEMPLATES = {"vicuna_v1": vicuna_chat_template("<s>", "</s>"), CHATML.name: CHATML_CHAT_TEMPLATE}


def is_our_chat_template(text: str) -> bool:
    """Is it a chat template that an export writes?"""
    formats = (family.hugging_face() for family in loaded_families())
    known = [*_CHAT_TEMPLATES.values(), *(one for its in formats for one in its.chat_templates.values())]
    return text.strip() in {one.strip() for one in known}


def template_of_chat_template(text: str) -> str | None:
    """The template that a folder's chat template stands for, where it is not one of the family: `chatml`, or
    `chat_template` for that of the language model, as an export writes it; else None.
    """
    if text.strip() == CHATML_CHAT_TEMPLATE.strip():
        return CHATML.name
    return CHAT_TEMPLATE.name if is_with_pictures(text) else None


def write_transformers_files(
    folder: Path,
    settings: ModelSettings,
    dtype: str,
    tokenizer: TextTokenizer,
    flags: Flags,
    dataset: Mapping[str, Any],
) -> None:
    """Write configuration, code, processor and tokenizer beside weights with the published names.

    Args:
        folder: an existing one.
        settings: sizes.
        dtype: of the weights, such as "bfloat16".
        tokenizer: of the model.
        flags: of the export.
        dataset: what the checkpoint records of its data; conversations in ChatML or the tokenizer's chat template
            decide the chat template, where no flag does.

    Raises:
        ConfigError: a tokenizer.model that is not Llama's, or another chat template beside the tokenizer than the
            data's.
    """
    family = find_family(settings.family)
    hf_format = family.hugging_face()
    fast, image_token_id = fast_tokenizer(tokenizer)
    fast.save(str(folder / "tokenizer.json"))
    chat_templates = _CHAT_TEMPLATES | dict(hf_format.chat_templates)
    talks = [name for name in dataset.get("templates", ()) if name in (CHATML.name, CHAT_TEMPLATE.name)]
    trained = talks[0] if len(talks) == 1 else None
    name = hf_format.chat_template(flags) or trained or family.chat_template()
    if name == CHAT_TEMPLATE.name:
        chat_template: str | None = _of_tokenizer(tokenizer, dataset.get("chat_templates", ()))
    else:
        chat_template = chat_templates.get(name)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")

    ids = token_ids(tokenizer)
    files = hf_format.transformers_files(settings.model, settings.vision, dtype, ids, image_token_id)
    processor_class = files["processor_config.json"]["processor_class"]
    if tokenizer.kind == TOKENIZERS:
        tokenizer_config = _json_tokenizer_config(Path(tokenizer.path).parent)
    else:
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
        tokenizer_config = _tokenizer_config(settings.model)
    tokenizer_config["processor_class"] = processor_class
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    for name, content in files.items():
        write_json(folder / name, content)
    for module in hf_format.code(settings.vision):
        shutil.copyfile(module, folder / module.name)


def _of_tokenizer(tokenizer: TextTokenizer, known: Sequence[str]) -> str:
    """The chat template beside a tokenizer, for messages that have pictures.

    Args:
        tokenizer: of the model.
        known: digests of the chat templates that its data was made with.

    Raises:
        ConfigError: there is none, or another one.
    """
    found = read_chat_template(tokenizer.path)
    if found is None or (known and chat_template_sha256(tokenizer.path) not in known):
        raise ConfigError(
            f"--tokenizer {Path(tokenizer.path).parent}: has {'another' if found else 'no'} chat template, and the "
            "model's conversations were made with the tokenizer's own; name its folder as it was for the data"
        )
    return chat_template_with_pictures(DATE_MACRO + found[1])


def _json_tokenizer_config(folder: Path) -> dict[str, Any]:
    """What stands beside a tokenizer.json, without its chat template; texts are padded in front."""
    config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    if not config.get("pad_token"):
        config["pad_token"] = config["eos_token"]
    return {**config, "tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}


def _tokenizer_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": model.max_position_embeddings,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a configuration file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
