"""A tokenizer.json, as Llama 3 and Qwen2 have it, through Hugging Face's library `tokenizers`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import tokenizers

from megatron_eve.data.errors import DataError
from megatron_eve.data.text.text_tokenizer import (
    TOKENIZERS,
    TextTokenizer,
    kind_with,
    piece_bytes,
    read_tokenizer,
)
from megatron_eve.runtime.wrong_content import wrong_content

_CONFIG = "tokenizer_config.json"


class JsonTokenizer(TextTokenizer):
    """A `tokenizer.json`, with the tokenizer_config.json beside it, which names the tokens BOS and EOS.

    Args:
        path: of the tokenizer.json.
        added: control tokens of a family; those that it lacks have the ids behind its own, in this order.

    Attributes:
        byte_level: its tokens are of bytes, as of Llama 3 and Qwen2. Otherwise it is made of a tokenizer.model.

    Raises:
        DataError: one of the files is missing or no such file, or names no EOS token that the tokenizer has.
    """

    def __init__(self, path: str | Path, added: Sequence[str] = ()) -> None:
        self.path = str(path)
        self.kind = kind_with(TOKENIZERS, added)
        content = read_tokenizer(path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises a bare Exception
            reason = " ".join(str(error).split())[:160]
            message = f"is not a tokenizer.json ({reason}): use the one that comes with the language model"
            raise DataError(f"{path} {wrong_content(Path(path)) or message}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.add_special_tokens(
            [token for token in added if self._tokenizer.token_to_id(token) is None]
        )
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        decoder = self._tokenizer.get_added_tokens_decoder()
        self._added = {token: one.content for token, one in decoder.items()}
        self.control_tokens = tuple(one.content for one in decoder.values() if one.special)
        self.byte_level = b'"ByteLevel"' in content
        self._of_bytes = bytes_of_characters() if self.byte_level else {}
        config = _config(Path(path).parent / _CONFIG)
        self.bos_id = self._control_token(config, "bos_token")
        eos_id = self._control_token(config, "eos_token")
        if eos_id is None:
            raise DataError(
                f"{Path(path).parent / _CONFIG} names no eos_token, which ends every answer: copy the "
                f"{_CONFIG} of the language model beside {path}"
            )
        self.eos_id = eos_id

    def _control_token(self, config: dict[str, Any], key: str) -> int | None:
        """Id of a token that the configuration names, as text or as an object; None if it names none."""
        named = config.get(key)
        text = named.get("content") if isinstance(named, dict) else named
        if text is None:
            return None
        found: int | None = self._tokenizer.token_to_id(text) if isinstance(text, str) else None
        if found is None:
            raise DataError(
                f"{Path(self.path).parent / _CONFIG}: {key} is {text!r:.80}, which {self.path} does not have: copy "
                "both files from the same model"
            )
        return found

    def encode_with_offsets(self, text: str) -> Iterator[tuple[int, int]]:
        """See `TextTokenizer.encode_with_offsets`."""
        found = self._tokenizer.encode(text, add_special_tokens=False)
        for token, (begin, _) in zip(found.ids, found.offsets, strict=True):
            yield token, min(begin, len(text) - 1)

    def encode_literally(self, text: str) -> Iterator[tuple[int, int]]:
        """See `TextTokenizer.encode_literally`. Tokens that the file does not call special (`<think>`) stay tokens."""
        found = self._literal.encode(text, add_special_tokens=False)
        for token, (begin, _) in zip(found.ids, found.offsets, strict=True):
            yield token, min(begin, len(text) - 1)

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """A copy that reads control tokens as text: that is a setting of the whole tokenizer."""
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = True
        return copy

    def token_bytes(self, token: int) -> bytes:
        """See `TextTokenizer.token_bytes`."""
        piece = self._added.get(int(token))
        if piece is not None:
            return piece.encode()
        piece = self._tokenizer.id_to_token(int(token)) or ""
        if self._of_bytes:
            return bytes(self._of_bytes[character] for character in piece)
        return piece_bytes(piece)

    def decode(self, ids: Sequence[int]) -> str:
        """See `TextTokenizer.decode`. Tokens that the file calls special are left out."""
        self._check_ids(ids)
        text: str = self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)
        return text


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing: it names the tokens BOS and EOS; copy it from the folder that tokenizer.json came from"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): copy it again") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} is not a JSON object: copy it again")
    return config


@cache
def bytes_of_characters() -> dict[str, int]:
    """{character: the byte that it stands for in byte-level BPE}; GPT-2's table, in which printable ones stay."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }
