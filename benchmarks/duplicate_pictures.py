"""Perceptual hashes of real and drawn pictures: copies that are found, different pictures taken for copies, time.

    python benchmarks/duplicate_pictures.py

Copies are made of the photos that scikit-image carries and of their halves and thirds, each cut out. The different
pictures are 10,000: tiles of 64 x 64 pixels of these photos, which do not overlap, each also turned by 90, 180 and 270
degrees; and drawings of shapes, bar charts and pages of text. They are not 10,000 photos: neighbouring tiles are more
alike than photos of different things, and many are of one colour but for noise.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from megatron_eve.curation.duplicates import PLAIN_BITS
from megatron_eve.curation.hashes import perceptual_hash, sha256_of
from megatron_eve.curation.near_duplicates import MAX_DISTANCE, drop_near, near_pairs
from megatron_eve.runtime.command_line import command_parser_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "quickstart"))
import photos

TILE = 64
DIFFERENT = 10_000
LEAST_SIDE = 96
Change = Callable[[Image.Image], Image.Image]


def encoded(image: Image.Image, quality: int) -> Image.Image:
    """The picture after JPEG encoding."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream)


def cut(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """The picture without some shares of its width and height."""
    width, height = image.size
    return image.crop(
        (round(width * left), round(height * top), round(width * (1 - right)), round(height * (1 - bottom)))
    )


def shrunk(image: Image.Image, method: Image.Resampling) -> Image.Image:
    """The picture with half the width and height."""
    return image.resize((image.width // 2, image.height // 2), method)


CHANGES: dict[str, Change] = {
    "JPEG, quality 60": lambda image: encoded(image, 60),
    "JPEG, quality 30": lambda image: encoded(image, 30),
    "half the side, Lanczos": lambda image: shrunk(image, Image.Resampling.LANCZOS),
    "half the side, bilinear": lambda image: shrunk(image, Image.Resampling.BILINEAR),
    "224 x 224, JPEG 75": lambda image: encoded(image.resize((224, 224)), 75),
    "1 % off each side": lambda image: cut(image, 0.01, 0.01, 0.01, 0.01),
    "2 % off one side": lambda image: cut(image, 0.02, 0, 0, 0),
    "2 % off right and bottom": lambda image: cut(image, 0, 0, 0.02, 0.02),
    "2 % off each side": lambda image: cut(image, 0.02, 0.02, 0.02, 0.02),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def all_photos() -> list[Image.Image]:
    """The photos of scikit-image."""
    return [Image.open(photos.find(name)).convert("RGB") for name in photos.load_captions()]


def pieces(image: Image.Image, parts: int) -> Iterator[Image.Image]:
    """The picture cut into parts x parts pieces; none if they are small."""
    width, height = image.width // parts, image.height // parts
    if min(width, height) >= LEAST_SIDE:
        for x in range(parts):
            for y in range(parts):
                yield image.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))


def tiles(image: Image.Image) -> Iterator[Image.Image]:
    """Tiles that do not overlap, each in four directions."""
    for x in range(0, image.width - TILE + 1, TILE):
        for y in range(0, image.height - TILE + 1, TILE):
            tile = image.crop((x, y, x + TILE, y + TILE))
            for turns in range(4):
                yield Image.fromarray(np.rot90(np.asarray(tile), turns))


def drawing(kind: str, random: np.random.Generator) -> Image.Image:
    """A drawing of 256 x 256 pixels: "shapes", "bar charts" or "pages of text"."""

    def colour() -> tuple[int, ...]:
        return tuple(random.integers(0, 256, 3).tolist())

    image = Image.new("RGB", (256, 256), colour() if kind == "shapes" else "white")
    draw = ImageDraw.Draw(image)
    if kind == "shapes":
        for _ in range(random.integers(1, 5)):
            x, y = random.integers(0, 200, 2).tolist()
            width, height = random.integers(20, 150, 2).tolist()
            shape = (draw.rectangle, draw.ellipse)[random.integers(2)]
            shape((x, y, x + width, y + height), fill=colour())
    elif kind == "bar charts":
        draw.line((30, 10, 30, 230, 246, 230), fill="black", width=2)
        bars = int(random.integers(3, 9))
        for bar in range(bars):
            x = 36 + bar * 210 // bars
            draw.rectangle((x, int(random.integers(20, 225)), x + 150 // bars, 230), fill=colour())
    else:
        for y in range(20, 20 + 14 * int(random.integers(8, 16)), 14):
            letters = "".join(chr(code) for code in random.integers(97, 123, int(random.integers(10, 36))))
            draw.text((20, y), letters, fill="black")
    return image


def hashes_of(images: Iterator[Image.Image] | list[Image.Image]) -> NDArray[np.uint64]:
    """Perceptual hashes."""
    return np.array([perceptual_hash(image) for image in images], np.uint64)


def print_copies(images: list[Image.Image]) -> None:
    """For each change, the share of copies that differ by at most so many bits."""
    original = hashes_of(images)
    print(f"copies of {len(images)} pictures, share found with --distance")
    print(f"{'':<26}" + "".join(f"{bits:>8}" for bits in range(0, MAX_DISTANCE + 1, 2)))
    for name, change in CHANGES.items():
        bits = np.bitwise_count(original ^ hashes_of([change(image) for image in images]))
        shares = [(bits <= most).mean() for most in range(0, MAX_DISTANCE + 1, 2)]
        print(f"{name:<26}" + "".join(f"{share:>8.1%}" for share in shares))


def print_different(photo_tiles: list[Image.Image]) -> None:
    """Different pictures that are taken for copies."""
    random = np.random.default_rng(0)
    kinds = ("shapes", "bar charts", "pages of text")
    each = -(-(DIFFERENT - len(photo_tiles)) // len(kinds))
    groups = {"tiles of photos": hashes_of(photo_tiles)}
    for kind in kinds:
        groups[kind] = hashes_of([drawing(kind, random) for _ in range(each)])
    groups["all together"] = np.concatenate(list(groups.values()))[:DIFFERENT]
    print("\ndifferent pictures taken for copies: rows that are dropped, and pairs, with --distance")
    print(f"{'':<42}" + "".join(f"{bits:>12}" for bits in range(0, MAX_DISTANCE + 1, 2)))
    for name, hashes in groups.items():
        left = hashes[np.bitwise_count(hashes) > PLAIN_BITS]
        label = f"{name}: {len(hashes):,}, {len(hashes) - len(left):,} plain"
        print(
            f"{label:<42}" + "".join(f"{text:>12}" for text in map(_taken_for_copies(left), (0, 2, 4, 6, 8)))
        )


def _taken_for_copies(hashes: NDArray[np.uint64]) -> Callable[[int], str]:
    def text(distance: int) -> str:
        dropped = int((drop_near(hashes, distance) >= 0).sum())
        values, counts = np.unique(hashes, return_counts=True)
        pairs = int((counts * (counts - 1) // 2).sum())
        if distance:
            size = dict(zip(values.tolist(), counts.tolist(), strict=True))
            for one, other in near_pairs(values, distance):
                pairs += sum(
                    size[a] * size[b]
                    for a, b in zip(values[one].tolist(), values[other].tolist(), strict=True)
                )
        return f"{dropped} ({pairs})"

    return text


def print_times() -> None:
    """Time of a picture."""
    photo = all_photos()[0].resize((640, 480))
    stream = io.BytesIO()
    photo.save(stream, "JPEG", quality=90)
    data = stream.getvalue()
    jobs: dict[str, Callable[[], object]] = {
        f"SHA-256 of {len(data) / 1000:.0f} kB": lambda: sha256_of(data),
        "decoding 640 x 480": lambda: Image.open(io.BytesIO(data)).convert("RGB"),
        "perceptual hash of 640 x 480": lambda: perceptual_hash(photo),
    }
    print("\nCPU time of a picture, ms: median of 5 times 50")
    for name, job in jobs.items():
        job()
        times = []
        for _ in range(5):
            start = time.process_time()
            for _ in range(50):
                job()
            times.append((time.process_time() - start) / 50)
        print(f"{name:<32}{1000 * float(np.median(times)):8.2f}")


def main() -> None:
    """Print all tables."""
    command_parser_of(__doc__).parse_args()
    images = all_photos()
    print_copies([piece for image in images for parts in (1, 2, 3) for piece in pieces(image, parts)])
    print_different([tile for image in images for tile in tiles(image)])
    print_times()


if __name__ == "__main__":
    main()
