"""The Llama tokenizer over sentencepiece, as Hugging Face's slow tokenizer does it with `legacy=True`.

The published models were trained with that behaviour: control tokens written in a text are cut out
first, and each stretch of text between them is tokenised by itself, with its own leading "▁".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from megatron_eve.data.errors import DataError
from megatron_eve.runtime.wrong_content import wrong_content


class Tokenizer:
    """A sentencepiece model file (`tokenizer.model`) with the control pieces `<s>`, `</s>` and `<unk>`.

    Args:
        path: the model file.

    Attributes:
        path: the file, as given.
        sha256: hexadecimal digest of the file; a dataset records it.

    Raises:
        DataError: the file is missing, is not a sentencepiece model, or lacks Llama's control pieces.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot read the tokenizer {path} ({error.strerror}): give the path of a tokenizer.model"
            ) from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except (RuntimeError, ValueError, OSError) as error:
            usual = (
                "is not a sentencepiece model: use the tokenizer.model that comes with Vicuna or Llama 2, not "
                "tokenizer.json"
            )
            raise DataError(f"{path} {wrong_content(Path(path)) or usual}") from error
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.unk_id: int = self._model.unk_id()
        control = (self.bos_id, self.eos_id, self.unk_id)
        self._special = {self._model.id_to_piece(i): i for i in control if i >= 0}
        if list(self._special) != ["<s>", "</s>", "<unk>"]:
            raise DataError(
                f"the tokenizer {path} has the control pieces {list(self._special)} where Llama has "
                "<s>, </s>, <unk>: use a Llama tokenizer.model"
            )
        self._split = re.compile("(" + "|".join(re.escape(piece) for piece in self._special) + ")")

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Token ids of `text`, with BOS in front if `bos`; control pieces written in it become their ids."""
        ids = [self.bos_id] if bos else []
        for stretch in self._split.split(text):
            if stretch in self._special:
                ids.append(self._special[stretch])
            elif stretch:
                ids.extend(self._model.encode(stretch, return_type=int))
        return ids

    def encode_with_offsets(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield (token id, index of the first character of `text` that the token stands for)."""
        start = 0
        for stretch in self._split.split(text):
            if stretch in self._special:
                yield self._special[stretch], start
            elif stretch:
                found = self._model.encode(stretch, return_type="offset_mapping")
                for token, (begin, _) in zip(found["ids"], found["offsets"], strict=True):
                    yield token, start + begin
            start += len(stretch)

    def check_newline(self) -> None:
        """Check that the newline with which every caption ends comes back from its tokens.

        Raises:
            DataError: the tokenizer's normalisation drops it, or it is an unknown piece.
        """
        if not all(self.decode(self.encode(text)).endswith("\n") for text in ("\n", "a\n")):
            raise DataError(
                f"the tokenizer {self.path} drops newlines, with which captions (template plain) end: use Llama's or "
                "Vicuna's tokenizer.model, or train one with normalization_rule_name=identity, "
                "remove_extra_whitespaces=false and byte_fallback=true"
            )

    def pieces(self) -> list[tuple[str, float]]:
        """Text and score of every piece, in the order of their ids."""
        return [(self._model.id_to_piece(i), self._model.get_score(i)) for i in range(self.vocab_size)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; BOS, EOS and UNK are left out, and so is the "▁" that encoding puts in front.

        Raises:
            ValueError: an id is not in the vocabulary (image placeholders are not text).
        """
        special = set(self._special.values())
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token id {token} is not one of the {self.vocab_size} pieces of {self.path}"
                )
        return self._model.decode([int(token) for token in ids if token not in special])
