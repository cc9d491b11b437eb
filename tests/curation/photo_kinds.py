"""Shards of pictures of known kinds: photos that scikit-image brings, each cropped, mirrored and lit in other ways."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import skimage
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.parquet import write_records

KINDS = (
    "astronaut", "brick", "camera", "cell", "chelsea", "clock_motion", "coffee", "coins", "color", "grass",
    "gravel", "horse", "hubble_deep_field", "ihc", "moon", "motorcycle_left", "page", "phantom", "retina", "rocket",
)  # fmt: skip


@cache
def _photo(kind: str) -> Image.Image:
    folder = Path(skimage.__file__).parent / "data"
    path = next(folder.glob(f"{kind}.*"))
    with Image.open(path) as image:
        photo = image.convert("RGB")
    photo.thumbnail((160, 160))
    return photo


def variant(kind: str, number: int) -> bytes:
    """A JPEG file: a crop of at least four fifths of each side, mirrored or not, lighter or darker by up to 20 %."""
    random = np.random.default_rng([KINDS.index(kind), number])
    photo = _photo(kind)
    share = random.uniform(0.8, 1, 2)
    width, height = (max(int(side * part), 8) for side, part in zip(photo.size, share, strict=True))
    left, top = (int(random.integers(0, room + 1)) for room in (photo.width - width, photo.height - height))
    found = photo.crop((left, top, left + width, top + height))
    if random.random() < 0.5:
        found = found.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    found = ImageEnhance.Brightness(found).enhance(random.uniform(0.8, 1.2))
    stream = io.BytesIO()
    found.save(stream, "JPEG", quality=int(random.integers(70, 95)))
    return stream.getvalue()


def kind_records(per_kind: int, seed: int = 0) -> tuple[list[Record], NDArray[np.int64]]:
    """Pairs in a random order, and the number of each one's kind."""
    kinds = np.repeat(np.arange(len(KINDS)), per_kind)
    numbers = np.tile(np.arange(per_kind), len(KINDS))
    order = np.random.default_rng(seed).permutation(len(kinds))
    records = []
    for at in order:
        kind, number = KINDS[kinds[at]], int(numbers[at])
        image = ImageFile(variant(kind, number), f"{kind}_{number}.jpg")
        turns = [{"from": "gpt", "value": f"<image>A picture of the kind {kind}."}]
        records.append(Record(f"{kind}_{number}", "photos", "pair", [image], turns))
    return records, kinds[order]


def write_shards(folder: Path, records: Sequence[Record], shards: int) -> list[Path]:
    """Cut records into shards of unequal sizes, in order."""
    bounds = np.linspace(0, 1, shards + 1) ** 1.3 * len(records)
    paths = []
    for shard, (start, stop) in enumerate(pairwise(bounds.tolist())):
        paths.append(folder / f"{shard:05d}.parquet")
        write_records(paths[-1], records[round(start) : round(stop)])
    return paths


def adjusted_rand_index(one: NDArray[np.int64], other: NDArray[np.int64]) -> float:
    """Agreement of two groupings (Hubert and Arabie 1985): 1 for the same, about 0 for independent ones."""
    table = np.zeros((int(one.max()) + 1, int(other.max()) + 1))
    np.add.at(table, (one, other), 1)

    def pairs(counts: NDArray[np.float64]) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, left, right = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = left * right / pairs(np.array([float(len(one))]))
    return (both - expected) / ((left + right) / 2 - expected)
