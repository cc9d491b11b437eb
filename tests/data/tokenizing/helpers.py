"""A dataset, and towers of the toy family, for the tests of codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.format.code_part import CodeSettings
from megatron_eve.data.format.code_writer import CodeWork

FAMILY = "tests.families.toy.family"
SIZES = {"image_size": 32, "grid": [4, 4], "depth": 3, "codebook_size": 8}
SETTINGS = CodeSettings(
    family=FAMILY,
    tower_sha256="cd" * 32,
    square_size=32,
    grid=(2, 3),
    depth=4,
    codebook_size=500,
    fit="stretch",
    dtype="float32",
    micro_batch_size=2,
    dataset_sha256="ab" * 32,
    num_images=301,
)


def write_tower(folder: Path, **sizes: Any) -> Path:
    """A toy tower; see `tests/families/toy/image_codes.py`."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SIZES | sizes))
    return folder


def some_codes(settings: CodeSettings, first: int, stop: int) -> NDArray[np.int64]:
    """Codes that differ from image to image: int64 [stop - first, h, w, D]."""
    values = np.arange(first, stop)[:, None] * 7 + np.arange(np.prod(settings.image_shape)) * 3
    return (values % settings.codebook_size).reshape(-1, *settings.image_shape)


def write_codes(prefix: Path, **changes: Any) -> str:
    """Codes without a dataset, or with the fingerprint of one among the `changes` of SETTINGS."""
    settings = replace(SETTINGS, **changes)
    with CodeWork(str(prefix), settings, overwrite=False) as work:
        for chunk in work.chunks():
            work.write(chunk, some_codes(settings, chunk.first, chunk.stop), [])
        assert work.finish() is not None
    return str(prefix)
