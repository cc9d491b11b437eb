"""The Llama tokenizer over sentencepiece, equal to Hugging Face's slow tokenizer.

A text is split at the control tokens written in it, and each segment between them is tokenised separately. With
`legacy=True` each has its own leading "▁"; with `legacy=False` only the beginning of the text has one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

import sentencepiece

from megatron_eve.data.errors import DataError
from megatron_eve.data.text.text_tokenizer import (
    SENTENCEPIECE,
    SENTENCEPIECE_NOT_LEGACY,
    TextTokenizer,
    kind_with,
    piece_bytes,
    read_tokenizer,
)
from megatron_eve.runtime.wrong_content import wrong_content

_PREFIX = "\u2581"


class Tokenizer(TextTokenizer):
    """A sentencepiece model file (`tokenizer.model`) with the control pieces `<s>`, `</s>` and `<unk>`.

    Args:
        path: the model file.
        legacy: as Hugging Face's setting of this name; see above.
        added: control tokens that the tokenizer has beside those, as Hugging Face's added tokens: those that are no
            pieces of the model have the ids behind its pieces, in this order.

    Attributes:
        added: their ids.

    Raises:
        DataError: the file is missing, is not a sentencepiece model, or lacks Llama's control pieces; or the
            added_tokens.json or tokenizer_config.json beside it gives the added tokens other ids.
    """

    bos_id: int

    def __init__(self, path: str | Path, legacy: bool = True, added: Sequence[str] = ()) -> None:
        self.path = str(path)
        self.kind = kind_with(SENTENCEPIECE if legacy else SENTENCEPIECE_NOT_LEGACY, added)
        self._legacy = legacy
        content = read_tokenizer(path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
            if not legacy:
                self._model.LoadFromSerializedProto(_without_dummy_prefix(content))
        except (RuntimeError, ValueError, OSError) as error:
            message = (
                "is not a sentencepiece model: use the tokenizer.model that comes with Vicuna or Llama 2, or a "
                "tokenizer.json, which is known by its suffix"
            )
            raise DataError(f"{path} {wrong_content(Path(path)) or message}") from error
        self.vocab_size = self._model.vocab_size()
        self.bos_id = self._model.bos_id()
        self.eos_id = self._model.eos_id()
        self.unk_id: int = self._model.unk_id()
        control = (self.bos_id, self.eos_id, self.unk_id)
        self._special = {self._model.id_to_piece(i): i for i in control if i >= 0}
        if list(self._special) != ["<s>", "</s>", "<unk>"]:
            raise DataError(
                f"the tokenizer {path} has the control pieces {list(self._special)} where Llama has "
                "<s>, </s>, <unk>: use a Llama tokenizer.model"
            )
        self.added = self._added_ids(added)
        self.vocab_size = max([self.vocab_size, *(token + 1 for token in self.added.values())])
        self._special |= self.added
        self._split = re.compile("(" + "|".join(re.escape(piece) for piece in self._special) + ")")

    def _added_ids(self, added: Sequence[str]) -> dict[str, int]:
        """Ids of added tokens: of the model, else behind its pieces. A file beside it must say the same."""
        pieces = [token for token in added if self._model.piece_to_id(token) != self.unk_id]
        missing = [token for token in added if token not in pieces]
        ids = {token: self._model.piece_to_id(token) for token in pieces}
        ids |= {token: self.vocab_size + place for place, token in enumerate(missing)}
        for file, theirs in _ids_beside(Path(self.path)) if added else ():
            for token in theirs.keys() & ids.keys():
                if theirs[token] != ids[token]:
                    raise DataError(
                        f"{file} gives {token} the id {theirs[token]}, and behind the {self.vocab_size} pieces of "
                        f"{self.path} it has {ids[token]}: give the tokenizer of a language model whose control tokens "
                        f"are {' '.join(added)}, or a tokenizer.model in a folder of its own"
                    )
        return {token: ids[token] for token in added}

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """See `TextTokenizer.encode`."""
        ids = self.bos if bos else []
        for segment, _, prefix in self._segments(text):
            if segment in self._special:
                ids.append(self._special[segment])
            else:
                ids.extend(self._model.encode(prefix + segment, return_type=int))
        return ids

    def encode_with_offsets(self, text: str) -> Iterator[tuple[int, int]]:
        """See `TextTokenizer.encode_with_offsets`."""
        for segment, start, prefix in self._segments(text):
            if segment in self._special:
                yield self._special[segment], start
            else:
                found = self._model.encode(prefix + segment, return_type="offset_mapping")
                for token, (begin, _) in zip(found["ids"], found["offsets"], strict=True):
                    yield token, start + max(begin - len(prefix), 0)

    def _segments(self, text: str) -> Iterator[tuple[str, int, str]]:
        """Control tokens and the segments between them, where each begins, and what to put in front of it."""
        start = 0
        for segment in self._split.split(text):
            if segment:
                yield segment, start, "" if self._legacy or start else _PREFIX
            start += len(segment)

    def pieces(self) -> list[tuple[str, float]]:
        """Text and score of every piece of the model, in the order of their ids."""
        return [
            (self._model.id_to_piece(i), self._model.get_score(i)) for i in range(self._model.vocab_size())
        ]

    def token_bytes(self, token: int) -> bytes:
        """See `TextTokenizer.token_bytes`."""
        if int(token) in self.added.values():
            return next(text for text, found in self.added.items() if found == int(token)).encode()
        return piece_bytes(self._model.id_to_piece(int(token)))

    def decode(self, ids: Sequence[int]) -> str:
        """See `TextTokenizer.decode`. BOS, EOS and UNK are left out."""
        self._check_ids(ids)
        special = set(self._special.values())
        text: str = self._model.decode([int(token) for token in ids if token not in special])
        return text if self._legacy else text.removeprefix(" ")


def _ids_beside(model: Path) -> Iterator[tuple[Path, dict[str, int]]]:
    """Ids of added tokens by Hugging Face's files beside a tokenizer.model; a file that cannot be read says nothing."""
    for name in ("added_tokens.json", "tokenizer_config.json"):
        file = model.parent / name
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if name == "tokenizer_config.json":
                content = {one["content"]: int(id_) for id_, one in content["added_tokens_decoder"].items()}
            yield file, {str(token): int(id_) for token, id_ in content.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue


def _without_dummy_prefix(content: bytes) -> bytes:
    """The same model file with `add_dummy_prefix` off, which sentencepiece has no call for."""
    model = import_module("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(content)
    model.normalizer_spec.add_dummy_prefix = False
    changed: bytes = model.SerializeToString()
    return changed
