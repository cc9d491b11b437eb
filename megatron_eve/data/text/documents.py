"""Tokenises records of every kind; holds the template "document" of pretraining on pictures between texts.

`document`: BOS, the text with its pictures in it, EOS; all of the text and EOS train. This is how the published
pretraining on MMC4 documents and COYO pairs reads them (`LazyMMC4Dataset`, `LazyCoyoDataset`, arXiv 2312.07533): each
text segment between images is tokenised separately, images at the end of a document are dropped, and there is no
separator between an image and its text.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import Record
from megatron_eve.data.text.conversation import (
    IGNORE_INDEX,
    IMAGE_SPLIT,
    IMAGE_TOKEN_ID,
    Encoded,
    encode_conversation,
    tiled_text,
)
from megatron_eve.data.text.templates import find_template
from megatron_eve.data.text.text_tokenizer import TextTokenizer
from megatron_eve.data.text.turns import ConversationError, check_image_count, checked_turns, is_blank
from megatron_eve.models.text_format import IMAGE_TOKEN, Template


def encode_record(
    record: Record, tokenizer: TextTokenizer, template: str | Template, tiles: Sequence[int] | None = None
) -> Encoded:
    """Tokenise a record.

    With `plain`, a pair becomes a question that holds only the image placeholders, and an answer, the caption.

    Args:
        record: of any kind; its images are counted, not read.
        tokenizer: of the dataset.
        template: any.
        tiles: of each image (`tiled_text`); None: images are not cut into tiles.

    Raises:
        SkipRow: the template does not accept records of this kind, or the text does not fit it.
        ValueError: an unknown template.
    """
    template = template if isinstance(template, Template) else find_template(template)
    if record.kind not in template.kinds:
        taken = " and ".join(template.kinds)
        raise SkipRow(
            "kind_template", f"a row of kind {record.kind}, and --template {template.name} takes {taken}"
        )
    if template.is_document:
        return encode_document(record, tokenizer, template, tiles)
    turns = record.turns
    if record.kind == "pair":
        text = caption = _text(record)
        while caption.startswith(IMAGE_TOKEN):
            caption = caption.removeprefix(IMAGE_TOKEN)
        turns = [
            {"from": "human", "value": text[: len(text) - len(caption)]},
            {"from": "gpt", "value": caption},
        ]
    return encode_conversation(turns, tokenizer, template, len(record.images), tiles)


def encode_document(
    record: Record, tokenizer: TextTokenizer, template: Template, tiles: Sequence[int] | None = None
) -> Encoded:
    """Tokenise a record of kind interleaved, pair or text by the template "document", or one that is like it.

    Returns:
        n tokens and n labels; BOS and images do not train, nor does what is behind an image by the template; all else
        does. Images at the end of the document are dropped, so there may be fewer IMAGE_TOKEN_ID than images in the
        record; the first ones are kept.

    Raises:
        SkipRow: it has not exactly one turn from "gpt", another number of `<image>` than images, or no visible text.
    """
    text = _text(record)
    check_image_count(text.count(IMAGE_TOKEN), len(record.images))
    if is_blank(text.replace(IMAGE_TOKEN, "")):
        raise SkipRow(
            "nothing_to_train", "there is no text" + (" beside its pictures" if record.images else "")
        )
    while text.endswith(IMAGE_TOKEN):
        text = text.removesuffix(IMAGE_TOKEN)
    text = template.place_images(text)
    if tiles is not None:
        text = tiled_text(text, tiles)
    image = [IMAGE_TOKEN_ID, *(tokenizer.encode(template.behind_image) if template.behind_image else ())]
    tokens = list(tokenizer.bos)
    labels = [IGNORE_INDEX] * len(tokens)
    for segment in IMAGE_SPLIT.split(text):
        if segment == IMAGE_TOKEN:
            tokens += image
            labels += [IGNORE_INDEX] * len(image)
        else:
            ids = tokenizer.encode(segment)
            tokens += ids
            labels += ids
    return Encoded([*tokens, tokenizer.eos_id], [*labels, tokenizer.eos_id], ends_in_text=True)


def _text(record: Record) -> str:
    """The text of the one turn."""
    turns = checked_turns(record.turns)
    if len(turns) != 1 or turns[0].role != "gpt":
        roles = ", ".join(turn.role for turn in turns[:4])
        raise ConversationError("document_turns", f"{len(turns)} turns, from {roles}")
    return turns[0].text
