"""Reasons for which preparing skips a row: those of all sources (`data/reasons.py`), and those of the preparers."""

from __future__ import annotations

from megatron_eve.data.reasons import REASONS, Reason

EVAL_SPLIT = "eval_split"
NOT_SELECTED = "not_selected"
NOT_IN_METADATA = "not_in_metadata"
NO_IMAGE = "no_image"

PREPARING_REASONS = REASONS | {
    EVAL_SPLIT: Reason(
        "the row belongs to a test or validation split",
        "nothing, a model is not trained on it; --allow-eval-splits takes it",
    ),
    NOT_SELECTED: Reason(
        "it is not among the rows of the metadata that --min-clip-similarity and --best-share select",
        "nothing, it was asked for",
    ),
    NOT_IN_METADATA: Reason(
        "none of the metadata files has its id, or its URL and text",
        "add the metadata files that are missing; without any of them rows are kept, and have no scores",
    ),
    NO_IMAGE: Reason("a document lists no picture", "nothing if they are few"),
}
"""{key under which skipped rows are counted: what it means and what to do}."""
