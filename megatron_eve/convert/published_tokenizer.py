"""The tokenizer of a folder in the published layout: the files that the public code opens it from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_eve.checkpoint.tokenizer_record import file_name
from megatron_eve.config import ConfigError
from megatron_eve.convert.transformers_folder import write_json
from megatron_eve.data.text.text_tokenizer import TextTokenizer
from megatron_eve.data.text.tokenizer import Tokenizer

GENERATION = "generation_config.json"
_CONFIG, _SPECIAL, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_FILES = (_CONFIG, _SPECIAL, _ADDED, "vocab.json", "merges.txt")
# Of a tokenizer.model that lies alone.
_LLAMA: dict[str, Any] = {
    "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "clean_up_tokenization_spaces": False,
    "eos_token": "</s>", "legacy": False, "pad_token": "<unk>", "padding_side": "right",
    "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>",
}  # fmt: skip
_KIND = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def write_published_tokenizer(folder: Path, tokenizer: TextTokenizer, ids: Mapping[str, int]) -> None:
    """Copy a tokenizer with the files beside it.

    Control tokens that the family added to a tokenizer.model (`TextRules.added_tokens`) are written into these files,
    where none of them names them.

    Args:
        folder: of the language model.
        tokenizer: of the model.
        ids: of control tokens, as config.json has them.

    Raises:
        ConfigError: a file beside it that holds no settings.
    """
    path = Path(tokenizer.path)
    shutil.copyfile(path, folder / file_name(tokenizer.kind))
    for name in _FILES:
        if (path.parent / name).is_file():
            shutil.copyfile(path.parent / name, folder / name)
    if isinstance(tokenizer, Tokenizer) and (added := _unnamed(folder, tokenizer)):
        _write_added(folder, added)
    if (path.parent / GENERATION).is_file():
        write_json(folder / GENERATION, {**settings_beside(path.parent / GENERATION), **ids})


def _unnamed(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Added tokens that are no pieces of the model, with their ids, unless a file names them."""
    pieces = len(tokenizer.pieces())
    behind = {token: number for token, number in tokenizer.added.items() if number >= pieces}
    named = "".join(
        (folder / name).read_text(encoding="utf-8") for name in (_CONFIG, _ADDED) if (folder / name).is_file()
    )
    return {} if all(f'"{token}"' in named for token in behind) else behind


def _write_added(folder: Path, added: Mapping[str, int]) -> None:
    path = folder / _CONFIG
    config = settings_beside(path) if path.is_file() else dict(_LLAMA)
    decoder: dict[str, Any] = config.get("added_tokens_decoder") or {
        str(number): {"content": token, **_KIND, "special": True}
        for number, token in enumerate(("<unk>", "<s>", "</s>"))
    }
    decoder |= {str(number): {"content": token, **_KIND, "special": True} for token, number in added.items()}
    config |= {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(added),
        "legacy": False,  # how the ids of training were made
        "tokenizer_class": "LlamaTokenizer",
    }
    write_json(path, config)
    write_json(folder / _ADDED, dict(sorted(added.items())))
    special = folder / _SPECIAL
    names: dict[str, Any] = settings_beside(special) if special.is_file() else {
        name: _LLAMA[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }  # fmt: skip
    tokens = [{"content": token, **_KIND} for token in added]
    write_json(special, {"additional_special_tokens": tokens, **names})


def settings_beside(path: Path) -> dict[str, Any]:
    """What a JSON file beside a tokenizer holds.

    Raises:
        ConfigError: no settings by name.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); copy the file again, or take it away") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no settings by name; copy the file again, or take it away")
    return values
