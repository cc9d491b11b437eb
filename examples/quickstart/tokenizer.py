"""A tokenizer of 512 pieces, trained in a second, with the traits of Llama's.

Byte pair encoding with byte fallback (so `<0x0A>` is the newline), `<unk>` 0, `<s>` 1, `</s>` 2, a space put in front
of a text, and no normalisation. A real run takes the `tokenizer.model` that comes with Vicuna.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import sentencepiece

VOCAB_SIZE = 512

# Words of the conversation template of stage 3, so that they too get pieces of their own.
TEMPLATE_TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: Describe the picture. What is shown in the image? ASSISTANT:"
)


def train(texts: Iterable[str], path: Path, pieces: int = VOCAB_SIZE) -> Path:
    """Train on `texts` and write the sentencepiece model of so many pieces to `path`; the same texts give the same
    file."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*texts, TEMPLATE_TEXT]),
            model_writer=file,
            model_type="bpe",
            vocab_size=pieces,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    return path
