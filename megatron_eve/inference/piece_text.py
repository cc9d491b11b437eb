"""Text of token ids by the pieces of a tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from megatron_eve.data.text.json_tokenizer import bytes_of_characters
from megatron_eve.data.text.text_tokenizer import BYTE_PIECE, piece_bytes
from megatron_eve.inference.engine import REPLACEMENT


class Decoder(Protocol):
    """Makes text of token ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens; a byte that is part of no character gives U+FFFD."""


class PieceText:
    """Decodes token ids with the pieces of a tokenizer.json, exactly as sentencepiece does.

    The `tokenizers` library drops a whole run of byte tokens if one of them is not part of a character.

    Args:
        tokenizer: of transformers, with Llama's pieces, or of byte-level BPE.
    """

    def __init__(self, tokenizer: Any) -> None:
        special = {number for number, added in tokenizer.added_tokens_decoder.items() if added.special}
        special |= set(tokenizer.all_special_ids)
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        by_bytes = type(tokenizer.backend_tokenizer.decoder).__name__ == "ByteLevel"
        bytes_of = _bytes_of_characters if by_bytes else piece_bytes
        self._bytes = [b"" if number in special else bytes_of(piece) for number, piece in enumerate(pieces)]
        # Llama's "▁" in front of a text stands for no space; a byte that is a space does.
        self._begins = [not by_bytes and not BYTE_PIECE.fullmatch(piece) for piece in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens; a byte that is part of no character gives U+FFFD."""
        known = [token for token in ids if token < len(self._bytes) and self._bytes[token]]
        content = b"".join(self._bytes[token] for token in known)
        if known and self._begins[known[0]]:
            content = content.removeprefix(b" ")
        text = ""
        while content:
            try:
                return text + content.decode()
            except UnicodeDecodeError as error:
                text += content[: error.start].decode() + REPLACEMENT
                content = content[error.start + 1 :]
        return text


def _bytes_of_characters(piece: str) -> bytes:
    """Of byte-level BPE; added tokens are written as they are."""
    table = bytes_of_characters()
    return bytes(map(table.__getitem__, piece)) if all(map(table.__contains__, piece)) else piece.encode()
