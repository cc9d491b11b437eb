"""Tokenises records of every kind; holds the template "document" of pretraining on pictures between texts.

`document`: BOS, the text with its pictures in it, EOS; all of the text and EOS train. This is how the published
pretraining on MMC4 documents and COYO pairs reads them (`LazyMMC4Dataset`, `LazyCoyoDataset`, arXiv 2312.07533): each
text segment between images is tokenised separately, images at the end of a document are dropped, and there is no
separator between an image and its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import Record
from megatron_eve.data.text.conversation import (
    IGNORE_INDEX,
    IMAGE_SPLIT,
    IMAGE_TOKEN_ID,
    Encoded,
    drawn_placeholders,
    encode_conversation,
    image_labels,
    place_pictures,
    tiled_text,
)
from megatron_eve.data.text.templates import template_of
from megatron_eve.data.text.text_tokenizer import TextTokenizer
from megatron_eve.data.text.turns import ConversationError, Turn, check_image_count, checked_turns, is_blank
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
    template = template if isinstance(template, Template) else template_of(template, tokenizer)
    if record.kind not in template.kinds:
        taken = " and ".join(template.kinds)
        raise SkipRow(
            "kind_template", f"a row of kind {record.kind}, and --template {template.name} takes {taken}"
        )
    drawn = record.drawn_images
    if any(drawn) and template.around_drawn is None:
        raise SkipRow("draw_template", f"--template {template.name} draws no pictures")
    if len(drawn) != len(record.images):
        raise SkipRow("draw_field", f"{len(drawn)} values for {len(record.images)} images")
    if template.is_document:
        return encode_document(record, tokenizer, template, tiles)
    turns = record.turns
    if record.kind == "generation":
        turns = _with_prompt(record, template)
    if record.kind == "pair":
        text = caption = _text(record)
        while caption.startswith(IMAGE_TOKEN):
            caption = caption.removeprefix(IMAGE_TOKEN)
        turns = [
            {"from": "human", "value": text[: len(text) - len(caption)]},
            {"from": "gpt", "value": caption},
        ]
    return encode_conversation(turns, tokenizer, template, len(record.images), tiles, drawn, record.is_video)


def encode_document(
    record: Record, tokenizer: TextTokenizer, template: Template, tiles: Sequence[int] | None = None
) -> Encoded:
    """Tokenise a record of kind interleaved, pair or text by the template "document", or one that is like it.

    Returns:
        n tokens and n labels; BOS and images do not train, nor does what is behind an image by the template; all else
        does. Images at the end of the document are dropped unless they are to be drawn, so there may be fewer
        IMAGE_TOKEN_ID than images in the record; the first ones are kept.

    Raises:
        SkipRow: it has not exactly one turn from "gpt", another number of `<image>` than images, or no visible text.
    """
    text = _text(record)
    check_image_count(text.count(IMAGE_TOKEN), len(record.images))
    if is_blank(text.replace(IMAGE_TOKEN, "")):
        raise SkipRow(
            "nothing_to_train", "there is no text" + (" beside its pictures" if record.images else "")
        )
    drawn = list(record.drawn_images)
    while text.endswith(IMAGE_TOKEN) and not drawn[-1]:
        text = text.removesuffix(IMAGE_TOKEN)
        drawn.pop()
    [placed] = place_pictures([Turn("gpt", text)], template, drawn, record.is_video)
    text = placed.text
    if tiles is not None:
        text = tiled_text(text, tiles)
    image = [IMAGE_TOKEN_ID, *(tokenizer.encode(template.behind_image) if template.behind_image else ())]
    tokens = list(tokenizer.bos)
    labels = [IGNORE_INDEX] * len(tokens)
    draw = iter(drawn_placeholders(drawn, tiles))
    for segment in IMAGE_SPLIT.split(text):
        if segment == IMAGE_TOKEN:
            tokens += image
            labels += image_labels(next(draw), len(image))
        else:
            ids = tokenizer.encode(segment)
            tokens += ids
            labels += ids
    return Encoded([*tokens, tokenizer.eos_id], [*labels, tokenizer.eos_id], ends_in_text=True)


def as_generation(record: Record) -> Record:
    """A pair as a record of kind generation: its picture, or its video, is to be drawn from its caption.

    Raises:
        SkipRow: it is not one turn.
    """
    caption = _text(record)
    while caption.startswith(IMAGE_TOKEN):
        caption = caption.removeprefix(IMAGE_TOKEN)
    turns = [
        {"from": "human", "value": caption},
        {"from": "gpt", "value": IMAGE_TOKEN * (len(record.images) or 1)},
    ]
    return replace(record, kind="generation", turns=turns, drawn=True)


def _with_prompt(record: Record, template: Template) -> list[dict[str, str]]:
    """The turns of a record of kind generation; a blank prompt is the template's."""
    turns = checked_turns(record.turns)
    if [turn.role for turn in turns] != ["human", "gpt"]:
        raise ConversationError("generation_turns", f"{len(turns)} turns")
    prompt = turns[0].text
    if is_blank(prompt):
        prompt = "" if record.is_video else template.blank_prompt
    if not prompt:
        raise SkipRow("generation_prompt", "there is no text to draw from")
    return [{"from": "human", "value": prompt}, {"from": "gpt", "value": turns[1].text}]


def _text(record: Record) -> str:
    """The text of the one turn."""
    turns = checked_turns(record.turns)
    if len(turns) != 1 or turns[0].role != "gpt":
        roles = ", ".join(turn.role for turn in turns[:4])
        raise ConversationError("document_turns", f"{len(turns)} turns, from {roles}")
    return turns[0].text
