"""Opens a tokenizer's file as the kind that it is."""

from __future__ import annotations

from pathlib import Path

from megatron_eve.data.text.text_tokenizer import SENTENCEPIECE, TextTokenizer
from megatron_eve.data.text.tokenizer import Tokenizer


def load_tokenizer(path: str | Path, legacy: bool) -> TextTokenizer:
    """Open a tokenizer.json, known by its suffix, or a tokenizer.model.

    Args:
        path: the file.
        legacy: how a tokenizer.model is read (`Tokenizer`); a tokenizer.json is read in one way.

    Raises:
        DataError: it is no such file.
    """
    if is_json(path):
        from megatron_eve.data.text.json_tokenizer import JsonTokenizer

        return JsonTokenizer(path)
    return Tokenizer(path, legacy)


def load_kind(path: str | Path, kind: str) -> TextTokenizer:
    """Open a tokenizer's file as one of `text_tokenizer.KINDS`. A file of another kind is opened as what it is.

    Raises:
        DataError: it is no such file.
    """
    return load_tokenizer(path, legacy=kind == SENTENCEPIECE)


def is_json(path: str | Path) -> bool:
    """Does the name of a tokenizer's file say that it is a tokenizer.json?"""
    return Path(path).suffix.lower() == ".json"
