"""Opens a tokenizer's file, or the one of a folder, as the kind that it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_eve.data.errors import DataError
from megatron_eve.data.text.text_tokenizer import SENTENCEPIECE, TOKENIZERS, TextTokenizer, split_kind
from megatron_eve.data.text.tokenizer import Tokenizer

TOKENIZER_FILE = "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"


def load_tokenizer(path: str | Path, legacy: bool, added: Sequence[str] = ()) -> TextTokenizer:
    """Open a tokenizer.json, known by its suffix, or a tokenizer.model.

    Args:
        path: the file, or a folder that holds one (`tokenizer_file`).
        legacy: how a tokenizer.model is read (`Tokenizer`); a tokenizer.json is read in one way.
        added: control tokens that it has behind its own (`TextRules.added_tokens`).

    Raises:
        DataError: it is no such file.
    """
    path = tokenizer_file(path)
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
    path = tokenizer_file(path, TOKENIZER_JSON if base == TOKENIZERS else TOKENIZER_FILE)
    return load_tokenizer(path, legacy=base == SENTENCEPIECE, added=added)


def tokenizer_file(path: str | Path, first: str = TOKENIZER_FILE) -> Path:
    """The file of a tokenizer: `path` itself, or of a folder the one in it.

    Args:
        path: a file or a folder.
        first: the name that is taken where a folder holds both; the published code of models with a tokenizer.model
            reads that one.

    Raises:
        DataError: the folder holds none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    names = sorted((TOKENIZER_FILE, TOKENIZER_JSON), key=lambda name: name != first)
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise DataError(
            f"the tokenizer {path} is a folder without {TOKENIZER_FILE} or {TOKENIZER_JSON}: name the folder of the "
            "language model, or the file"
        )
    return found


def is_json(path: str | Path) -> bool:
    """Does the name of a tokenizer's file say that it is a tokenizer.json?"""
    return Path(path).suffix.lower() == ".json"
