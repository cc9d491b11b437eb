"""Difference of the decoders from Pillow, in 8-bit levels, over many sizes and kinds of files.

    python benchmarks/differences.py --sizes 60

Photos of scikit-image, resized to random sizes (sides of 16 to 2400 pixels, ratios up to 12), saved as each kind of
file, and decoded for the model (672 pixels) and the teacher (336). Printed for each kind: the mean absolute difference
over all values of all images, the mean of the worst image, the largest difference of a single value, and the fraction
of values that differ by more than 2 levels.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import skimage.data
import torch
from PIL import Image

from megatron_eve.data.images.backends import open_decoder
from megatron_eve.data.images.interface import DecodeSettings, ImageTask
from megatron_eve.data.images.patches import picture_of
from megatron_eve.models.eve.geometry import planner
from megatron_eve.runtime.command_line import command_parser_of

IMAGE_SIZE, TEACHER_SIZE = 672, 336
SETTINGS = DecodeSettings(apply_exif=False, max_pixels=1 << 26)
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "immunohistochemistry")
KINDS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("JPEG 4:2:0, quality 90", "JPEG", "RGB", {"quality": 90, "subsampling": 2}),
    ("JPEG 4:4:4, quality 95", "JPEG", "RGB", {"quality": 95, "subsampling": 0}),
    ("JPEG progressive", "JPEG", "RGB", {"quality": 85, "progressive": True}),
    ("JPEG gray", "JPEG", "L", {"quality": 90}),
    ("JPEG CMYK", "JPEG", "CMYK", {"quality": 90}),
    ("PNG RGB", "PNG", "RGB", {}),
    ("PNG RGBA", "PNG", "RGBA", {}),
    ("PNG palette", "PNG", "P", {}),
    ("WebP", "WEBP", "RGB", {"quality": 90}),
    ("GIF (decoded by Pillow)", "GIF", "P", {}),
)


def sizes(count: int, random: np.random.Generator) -> list[tuple[int, int]]:
    """Random (width, height) pairs, log-uniform."""
    found: list[tuple[int, int]] = []
    while len(found) < count:
        width, height = np.exp(random.uniform(np.log(16), np.log(2400), 2)).astype(int).tolist()
        if max(width, height) <= 12 * min(width, height):
            found.append((width, height))
    return found


def tasks_of(kind: str, mode: str, options: dict[str, Any], shapes: list[tuple[int, int]]) -> list[ImageTask]:
    """One file for each size, from the photos in turn."""
    plan = planner({"image_size": IMAGE_SIZE, "teacher_size": TEACHER_SIZE})
    tasks = []
    for number, (width, height) in enumerate(shapes):
        photo = Image.fromarray(getattr(skimage.data, PHOTOS[number % len(PHOTOS)])())
        stream = io.BytesIO()
        photo.convert("RGB").resize((width, height), Image.Resampling.LANCZOS).convert(mode).save(
            stream, kind, **options
        )
        tasks.append(ImageTask(stream.getvalue(), plan(width, height).views))
    return tasks


def levels(task: ImageTask, found: Any, expected: Any) -> torch.Tensor:
    """Distances of all values of both pictures; the teacher's without its grey border."""
    assert isinstance(found, dict) and isinstance(expected, dict)
    pictures = [
        [picture_of(some[name].numpy(), view).astype(int) for some in (found, expected)]
        for name, view in task.views.items()
    ]
    return torch.cat([torch.from_numpy(abs(ours - theirs)).flatten() for ours, theirs in pictures])


def main() -> None:
    """Compare the decoders and print the table."""
    parser = command_parser_of(__doc__)
    parser.add_argument("--sizes", type=int, default=60, help="sizes, the same for every kind")
    arguments = parser.parse_args()
    shapes = sizes(arguments.sizes, np.random.default_rng(0))
    plain = open_decoder("pillow", SETTINGS, threads=1, gpu=None)
    print("| decoder | kind | mean | worst picture's mean | largest | off by more than 2 |")
    print("|---|---|---|---|---|---|")
    for name in ("threads", "dali"):
        decoder = open_decoder(name, SETTINGS, threads=2, gpu=None)  # type: ignore[arg-type]
        for kind, file_format, mode, options in KINDS:
            tasks = tasks_of(file_format, mode, options, shapes)
            found, expected = decoder.prepare(tasks), plain.prepare(tasks)
            parts = [levels(*three) for three in zip(tasks, found, expected, strict=True)]
            everything = torch.cat(parts).float()
            print(
                f"| {name} | {kind} | {everything.mean():.4f} | {max(p.float().mean() for p in parts):.3f} | "
                f"{int(everything.max())} | {100 * (everything > 2).float().mean():.2f} % |",
                flush=True,
            )
        decoder.close()


if __name__ == "__main__":
    main()
