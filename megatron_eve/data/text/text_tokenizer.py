"""What all tokenizers have in common, and how their files are read.

A tokenizer.model of sentencepiece is read in one of two ways, those of Hugging Face's slow tokenizer with `legacy=True`
and `legacy=False`; a tokenizer.json in the one way of the library `tokenizers`. A model has to be used with the ids
that it was trained with, so datasets and checkpoints record the kind beside the sha256 of the file.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_eve.data.errors import DataError

SENTENCEPIECE = "sentencepiece"
SENTENCEPIECE_NOT_LEGACY = "sentencepiece legacy=False"
TOKENIZERS = "tokenizers"
KINDS = {
    SENTENCEPIECE: "a tokenizer.model with --tokenizer-legacy",
    SENTENCEPIECE_NOT_LEGACY: "a tokenizer.model with --no-tokenizer-legacy",
    TOKENIZERS: "a tokenizer.json",
}
"""How a tokenizer's file is read, and what that is in messages."""
SAME_KIND = (
    "preprocess all with the same file, for the same --family, and with --tokenizer-legacy, or all with "
    "--no-tokenizer-legacy"
)
"""Remedy for datasets whose tokenizers' files were read in different ways."""


_WITH = " with "


def kind_with(kind: str, added: Sequence[str]) -> str:
    """One of `KINDS` with control tokens of a family behind the tokenizer's own (`TextRules.added_tokens`)."""
    return f"{kind}{_WITH}{' '.join(added)}" if added else kind


def split_kind(kind: str) -> tuple[str, tuple[str, ...]]:
    """The inverse of `kind_with`."""
    base, _, added = kind.partition(_WITH)
    return base, tuple(added.split())


class TextTokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        path: its file, as passed in.
        sha256: hexadecimal digest of the file.
        kind: of `KINDS`, or one of these with added tokens (`kind_with`).
        vocab_size: number of tokens, added ones included.
        bos_id: of the token in front of every text; None where there is none (Qwen2).
        eos_id: of the token that ends a text.
        control_tokens: its control tokens as they are written, where `encode_literally` can leave them text; else none.
    """

    path: str
    sha256: str
    kind: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    control_tokens: Sequence[str] = ()

    @property
    def bos(self) -> list[int]:
        """The ids in front of every text: one, or none."""
        return [] if self.bos_id is None else [self.bos_id]

    @abstractmethod
    def encode_with_offsets(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield (token id, index in `text` of the first character of the token), without BOS.

        Control tokens written in the text become their ids.
        """

    def encode_literally(self, text: str) -> Iterator[tuple[int, int]]:
        """`encode_with_offsets` of a text whose control tokens are text, as of transformers' `split_special_tokens`.

        Raises:
            ValueError: this kind of tokenizer cannot.
        """
        raise ValueError(f"{self.path}: control tokens are told from typed text with a tokenizer.json alone")

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Token ids of `text`, with BOS in front if `bos`; control tokens written in the text become their ids."""
        return [*(self.bos if bos else ()), *(token for token, _ in self.encode_with_offsets(text))]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens and without the leading "▁" that encoding adds.

        Raises:
            ValueError: an id is not in the vocabulary (image placeholders are not text).
        """

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """UTF-8 text of one token, a control token as it is written; a token may hold a part of a character."""

    def check_newline(self) -> None:
        """Check that a newline, with which every caption ends, survives encoding and decoding.

        Raises:
            DataError: the tokenizer's normalisation drops it, or it is an unknown piece.
        """
        if not all(self.decode(self.encode(text)).endswith("\n") for text in ("\n", "a\n")):
            raise DataError(
                f"the tokenizer {self.path} drops newlines, with which captions (template plain) end: use Llama's or "
                "Vicuna's tokenizer.model, or train one with normalization_rule_name=identity, "
                "remove_extra_whitespaces=false and byte_fallback=true"
            )

    def _check_ids(self, ids: Sequence[int]) -> None:
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token id {token} is not one of the {self.vocab_size} pieces of {self.path}"
                )


BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
"""A piece of sentencepiece that stands for one byte."""


def piece_bytes(piece: str) -> bytes:
    """UTF-8 text of a piece of sentencepiece, or its byte; a "▁" is a space."""
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()


def read_tokenizer(path: str | Path) -> bytes:
    """The bytes of a tokenizer's file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read the tokenizer {path} ({error.strerror}): give the path of a tokenizer.model or tokenizer.json"
        ) from error
