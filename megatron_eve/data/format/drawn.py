"""Which images of a dataset are to be drawn (predicted), by the models that can: an optional part.

    OUT_drawn.npy   bool [images]

It is there where some image is to be drawn; the manifest's `parts` records it as "drawn". In the text of such an image
the label at its placeholder is IMAGE_TOKEN_ID, and IGNORE_INDEX at that of others. The part says the same, so that the
denominators of losses are known without reading texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.errors import AGAIN, DataError
from megatron_eve.data.format.manifest import MANIFEST, DatasetInfo, open_records
from megatron_eve.data.text.conversation import IMAGE_TOKEN_ID
from megatron_eve.models.family import ImagePlan

PART = "drawn"
"""Name in the manifest's `parts`."""
DRAWN = "_drawn.npy"
DRAWN_DTYPE = np.dtype(np.bool_)


def part_record(images: int, visual_labels: int) -> dict[str, Any]:
    """What the manifest records: images that are to be drawn, and rows of these."""
    return {"dtype": DRAWN_DTYPE.name, "images": images, "visual_labels": visual_labels}


def drawn_counts(info: DatasetInfo) -> tuple[int, int]:
    """Images that are to be drawn, and rows of these; (0, 0) where there are none."""
    part = info.parts.get(PART)
    return (int(part["images"]), int(part["visual_labels"])) if part else (0, 0)


def open_drawn(prefix: str, info: DatasetInfo) -> NDArray[np.bool_] | None:
    """Which images of the dataset at a prefix are to be drawn: bool [images], mapped; None where none is.

    Raises:
        DataError: the part is missing, truncated, or does not match the manifest.
    """
    if PART not in info.parts:
        return None
    part = info.parts[PART]
    if not isinstance(part, dict) or not all(
        type(part.get(key)) is int for key in ("images", "visual_labels")
    ):
        raise DataError(f"{prefix}{MANIFEST} does not say how many images are to be drawn: {AGAIN}")
    drawn = open_records(prefix + DRAWN, DRAWN_DTYPE, info.num_images)
    images, _ = drawn_counts(info)
    if (found := int(np.count_nonzero(drawn))) != images:
        raise DataError(
            f"{prefix}{DRAWN} says that {found} images are to be drawn and {prefix}{MANIFEST} {images}: {AGAIN}"
        )
    return drawn


def drawn_in_text(
    tokens: NDArray[np.int64], labels: NDArray[np.int64], plans: Sequence[ImagePlan]
) -> tuple[NDArray[np.bool_], str | None]:
    """Which images of a sample are to be drawn, as its labels say: bool [images]; and what is wrong with that, or None.

    Args:
        tokens: [n] with a placeholder for each image, or for each of its tiles.
        labels: [n], not shifted.
        plans: of the images.
    """
    every = labels[tokens == IMAGE_TOKEN_ID] == IMAGE_TOKEN_ID
    tiles = [plan.tiles for plan in plans]
    first = np.cumsum([0, *tiles])[:-1].astype(np.int64)
    drawn = every[first]
    if (np.repeat(drawn, tiles) != every).any():
        return drawn, "some tiles of an image are to be drawn and others are not"
    return drawn, None
