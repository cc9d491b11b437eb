"""Tokenises records of every kind; holds the template "document" of VILA's pretraining.

`document`: `<s>`, the text with its pictures in it, `</s>`; all of the text and `</s>` train. This is
how NVlabs/VILA v1.0 (`LazyMMC4Dataset`, `LazyCoyoDataset`) reads MMC4 documents and COYO pairs: each text segment
between images is tokenised separately, images at the end of a document are dropped, and there is no separator between
an image and its text.
"""

from __future__ import annotations

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import Kind, Record
from megatron_eve.data.text.conversation import (
    IGNORE_INDEX,
    IMAGE_SPLIT,
    IMAGE_TOKEN,
    IMAGE_TOKEN_ID,
    ConversationError,
    Encoded,
    check_image_count,
    checked_turns,
    encode_conversation,
    is_blank,
)
from megatron_eve.data.text.tokenizer import Tokenizer

_KINDS: dict[str, tuple[Kind, ...]] = {
    "plain": ("conversation", "pair"),
    "vicuna_v1": ("conversation",),
    "document": ("interleaved", "pair", "text"),
}


def encode_record(record: Record, tokenizer: Tokenizer, template: str) -> Encoded:
    """Tokenise a record.

    With `plain`, a pair becomes a question that holds only the image placeholders, and an answer, the caption.

    Args:
        record: of any kind; its images are counted, not read.
        tokenizer: of the dataset.
        template: "plain", "vicuna_v1" or "document".

    Raises:
        SkipRow: the template does not accept records of this kind, or the text does not fit it.
        ValueError: an unknown template.
    """
    if template not in _KINDS:
        raise ValueError(f"unknown template {template!r}: use one of {', '.join(sorted(_KINDS))}")
    if record.kind not in _KINDS[template]:
        taken = " and ".join(_KINDS[template])
        raise SkipRow(
            "kind_template", f"a row of kind {record.kind}, and --template {template} takes {taken}"
        )
    if template == "document":
        return encode_document(record, tokenizer)
    turns = record.turns
    if record.kind == "pair":
        text = caption = _text(record)
        while caption.startswith(IMAGE_TOKEN):
            caption = caption.removeprefix(IMAGE_TOKEN)
        turns = [
            {"from": "human", "value": text[: len(text) - len(caption)]},
            {"from": "gpt", "value": caption},
        ]
    return encode_conversation(turns, tokenizer, template, len(record.images))


def encode_document(record: Record, tokenizer: Tokenizer) -> Encoded:
    """Tokenise a record of kind interleaved, pair or text by the template "document".

    Returns:
        n tokens and n labels; `<s>` and images do not train, all else does. Images at the end of the document are
        dropped, so there may be fewer IMAGE_TOKEN_ID than images in the record; the first ones are kept.

    Raises:
        SkipRow: it has not exactly one turn from "gpt", another number of `<image>` than images, or no visible text.
    """
    text = _text(record)
    check_image_count(text.count(IMAGE_TOKEN), len(record.images))
    if is_blank(text.replace(IMAGE_TOKEN, "")):
        raise SkipRow(
            "nothing_to_train", "there is no text" + (" beside its pictures" if record.images else "")
        )
    tokens, labels = [tokenizer.bos_id], [IGNORE_INDEX]
    for segment in IMAGE_SPLIT.split(text):
        if segment == IMAGE_TOKEN:
            tokens.append(IMAGE_TOKEN_ID)
            labels.append(IGNORE_INDEX)
        else:
            ids = tokenizer.encode(segment)
            tokens += ids
            labels += ids
    whole = Encoded(tokens, labels, ends_in_text=True).cut(len(tokens))
    return Encoded([*whole.tokens, tokenizer.eos_id], [*whole.labels, tokenizer.eos_id], ends_in_text=True)


def _text(record: Record) -> str:
    """The text of the one turn."""
    turns = checked_turns(record.turns)
    if len(turns) != 1 or turns[0].role != "gpt":
        roles = ", ".join(turn.role for turn in turns[:4])
        raise ConversationError("document_turns", f"{len(turns)} turns, from {roles}")
    return turns[0].text
