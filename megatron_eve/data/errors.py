"""What goes wrong with data: a dataset that cannot be used, or one row of the input that is left out."""

from __future__ import annotations

from megatron_eve.runtime.errors import UserError

AGAIN = "copy the dataset again, or make it again with tools/preprocess_data.py"
"""What to do about a damaged dataset."""


class DataError(UserError, ValueError):
    """Data on disk cannot be used as asked.

    The message names the file, the row where there is one, and what to do about it.
    """


class SkipRow(ValueError):
    """One row of the input, or one image file, cannot be used; preprocessing leaves it out and counts it.

    Attributes:
        reason: the key that it is counted by, such as "image_missing".
        detail: what was found.
        id, image: what the row calls itself and its pictures, where whoever raised this has read that.
    """

    id: str | None = None
    image: str | None = None

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
