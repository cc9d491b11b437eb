"""Reasons for which preparing skips a row: those of all sources (`data/reasons.py`), and those of the preparers."""

from __future__ import annotations

from megatron_eve.data.reasons import REASONS, Reason

EVAL_SPLIT = "eval_split"
NOT_SELECTED = "not_selected"

PREPARING_REASONS = REASONS | {
    EVAL_SPLIT: Reason(
        "the row belongs to a test or validation split",
        "nothing, a model is not trained on it; --allow-eval-splits takes it",
    ),
    NOT_SELECTED: Reason(
        "its scores are below those that --min-clip-similarity and --best-share ask for",
        "nothing, it was asked for",
    ),
}
"""{key under which skipped rows are counted: what it means and what to do}."""

UNLISTED = frozenset({NOT_SELECTED})
"""Reasons whose rows are counted only: they are the larger part of a download, as was asked for."""
