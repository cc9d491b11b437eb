"""VILA-U's templates and its control tokens (mit-han-lab/vila-u), as data. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from megatron_eve.models.text_format import DOCUMENT, VICUNA_V1, TextRules, as_written, images_in_place

IMAGE_TOKENS = ("<im_start>", "<im_end>")
VIDEO_TOKENS = ("<vi_start>", "<vi_end>")
SPECIAL_TOKENS = (*IMAGE_TOKENS, *VIDEO_TOKENS)
"""What stands around a picture and around the pictures of a video: the last ids of the vocabulary, in this order."""

_V1 = replace(
    VICUNA_V1,
    name="v1",
    kinds=("conversation", "generation"),
    what="as vicuna_v1, with <im_start> and <im_end> around pictures to read or to draw, and <vi_start> and <vi_end> "
    "around the frames of a video to draw (VILA-U)",
    blank_system_is_default=False,
    place_images=images_in_place,
    place_in_prompt=images_in_place,
    adds_images=True,
    around_image=IMAGE_TOKENS,
    around_drawn=IMAGE_TOKENS,
    around_drawn_video=VIDEO_TOKENS,
    place_frames=as_written,
    blank_prompt="An image.",
)
_V1_FLAN = replace(
    _V1,
    name="v1_flan",
    kinds=("conversation",),
    what="as v1 without a system prompt, and with nothing around pictures that are read (FLAN of VILA-U)",
    default_system="",
    place_images=as_written,
    around_image=("", ""),
    prompts=False,
)
_V1_DOCUMENT = replace(
    DOCUMENT,
    name="v1_document",
    what="as document, with <im_start> and <im_end> around pictures that are to be drawn (VILA-U)",
    around_drawn=IMAGE_TOKENS,
    around_drawn_video=VIDEO_TOKENS,
)

TEXT_RULES = TextRules(
    templates={template.name: template for template in (_V1, _V1_FLAN, _V1_DOCUMENT)},
    tokenizer_legacy=False,
    added_tokens=SPECIAL_TOKENS,
    length_counts_rows=True,
)
