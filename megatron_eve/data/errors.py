"""Errors of the data engine: a dataset that cannot be used, or one row of the input that is skipped."""

from __future__ import annotations

from megatron_eve.runtime.errors import UserError

AGAIN = "copy the dataset again, or make it again with tools/preprocess_data.py"
"""Remedy in messages about a damaged dataset."""


class DataError(UserError, ValueError):
    """Data on disk cannot be used as requested.

    The message names the file, the row where there is one, and what to do about it.
    """


class SkipRow(ValueError):
    """One row of the input, or one image file, cannot be used; preprocessing skips and counts it.

    Attributes:
        reason: key of `REASONS` under which it is counted, such as "image_missing".
        detail: what was found.
        id, image: id and image name of the row, where they were read before the error.
    """

    id: str | None = None
    image: str | None = None

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
