"""Reasons for which curation drops a row, beside those of preprocessing for rows that cannot be read."""

from __future__ import annotations

from megatron_eve.data.reasons import REASONS, Reason

_ASKED = "nothing, it was asked for"

CURATION_REASONS = {
    "picture_not_in_shard": Reason(
        "the shard has the path of a picture and not its bytes",
        "prepare the data again with the folder of the pictures, so that the shards hold them",
    ),
    "no_picture": Reason("the row has no picture, so it has no vector", "nothing, rows of text have none"),
    "too_small": Reason("the width or height of a picture is less than --min-side", _ASKED),
    "aspect_ratio": Reason("a picture is longer than --max-aspect times its shorter side", _ASKED),
    "padded": Reason(
        "a square picture with two bars of one colour, which img2dataset adds (--resize_mode border)",
        "if they are many, download again with --resize_mode no or keep_ratio",
    ),
    "caption_empty": Reason("the model answered without a visible character", _ASKED),
    "prompt_too_long": Reason(
        "prompt, picture and --max-new-tokens are more tokens than the captioning model takes",
        "shorten the prompts, or give a smaller --max-new-tokens",
    ),
    "server_error": Reason(
        "the server gave no answer about this picture, while it answered about others",
        "look at what it said (column detail), and at the log of the server",
    ),
    "caption_too_short": Reason("the caption has fewer words than --min-words", _ASKED),
    "caption_too_long": Reason("the caption has more words than --max-words", _ASKED),
    "caption_repetitive": Reason("the caption repeats its own words, more than --max-repeated", _ASKED),
    "caption_cut_off": Reason("the caption ends in a hyphen or in dots: its end was cut off", _ASKED),
    "caption_without_end": Reason("the last sentence of the caption has no final mark", _ASKED),
    "duplicate_exact": Reason("an earlier row has the same picture, byte by byte", "nothing, one is enough"),
    "duplicate_near": Reason("an earlier row has nearly the same picture", "nothing, one is enough"),
}
"""{key under which dropped rows are counted: what it means and what to do}."""


def find_reason(name: str) -> Reason:
    """What a reason means, of curation or of preprocessing."""
    return CURATION_REASONS.get(name) or REASONS[name]
