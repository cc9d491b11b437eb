"""Opens a tokenizer's file as the kind that it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_eve.data.text.text_tokenizer import SENTENCEPIECE, TextTokenizer, split_kind
from megatron_eve.data.text.tokenizer import Tokenizer


def load_tokenizer(path: str | Path, legacy: bool, added: Sequence[str] = ()) -> TextTokenizer:
    """Open a tokenizer.json, known by its suffix, or a tokenizer.model.

    Args:
        path: the file.
        legacy: how a tokenizer.model is read (`Tokenizer`); a tokenizer.json is read in one way.
        added: control tokens that it has behind its own (`TextRules.added_tokens`).

    Raises:
        DataError: it is no such file.
    """
    if is_json(path):
        from megatron_eve.data.text.json_tokenizer import JsonTokenizer

        return JsonTokenizer(path, added)
    return Tokenizer(path, legacy, added)


def load_kind(path: str | Path, kind: str) -> TextTokenizer:
    """Open a tokenizer's file as the kind that was recorded. A file of another of `KINDS` is opened as what it is.

    Raises:
        DataError: it is no such file.
    """
    base, added = split_kind(kind)
    return load_tokenizer(path, legacy=base == SENTENCEPIECE, added=added)


def is_json(path: str | Path) -> bool:
    """Does the name of a tokenizer's file say that it is a tokenizer.json?"""
    return Path(path).suffix.lower() == ".json"
