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
    "questions_layout": Reason(
        "a question, its answer or its choices are not under the published keys, or have the wrong type",
        "download the file again; correct the rows, or leave them out",
    ),
    "answer_index": Reason(
        "the index of the right answer is that of none of the choices", "correct the rows, or leave them out"
    ),
    "choice_labels": Reason(
        "the choices are letters on the picture, and the annotations do not say where to draw them",
        "download annotations/ of the same archive",
    ),
    "text_with_pictures": Reason(
        "a row of a data set without pictures names a picture or a video",
        "make a dataset of such rows with tools/preprocess_data.py --input-format llava",
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
