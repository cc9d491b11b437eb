"""Images/s from JPEG bytes to the input of the model: each decoder compared with the published code.

    python benchmarks/decoding.py --images 96 --rounds 5 --out tables
    python benchmarks/decoding.py --toy

Published: Pillow decodes, the image is resized twice (for the model at 672 pixels and for the teacher at 336), each is
pasted on a grey square and normalised in float on the host, in worker processes of a DataLoader. Ours gives the same
images as uint8 patches and squares, which are normalised on the device. One or two workers or threads (one or eight if
there are as many cores); medians of rounds in which all cases take turns. With a GPU and DALI, decoding on the GPU is
measured too; then only the bytes of the files are copied to the device.
"""

from __future__ import annotations

import io
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from gpu_common import parser, photos
from numpy.typing import NDArray
from PIL import Image
from tables import Table

from megatron_eve.data.images import padded_square, resize
from megatron_eve.data.images.backends import open_decoder
from megatron_eve.data.images.interface import DecodeSettings, ImageTask
from megatron_eve.models.eve.constants import PAD_COLOUR
from megatron_eve.models.eve.geometry import image_geometry, planner
from megatron_eve.models.towers.normalisation import CLIP_MEAN, CLIP_STD
from megatron_eve.runtime.dali import dali_is_installed

IMAGE_SIZE, TEACHER_SIZE = 672, 336
SHAPES = ((640, 480), (1600, 1200))
# GPU machines usually have many cores.
WORKERS = (1, 2) if (os.cpu_count() or 1) < 8 else (1, 8)
SETTINGS = DecodeSettings(apply_exif=False, max_pixels=89_478_485)


class Published(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Dataset of the published code: both float canvases of an image, with the mask as a fourth channel."""

    def __init__(self, files: list[bytes]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = Image.open(io.BytesIO(self._files[index])).convert("RGB")
        g = image_geometry(*image.size, IMAGE_SIZE, TEACHER_SIZE)
        return (
            normalised(resize(image, g.width, g.height), IMAGE_SIZE, 28),
            normalised(resize(image, g.teacher_width, g.teacher_height), TEACHER_SIZE, 14),
        )


def normalised(pixels: NDArray[np.uint8], size: int, unit: int) -> torch.Tensor:
    """float32 [4, S, S]: three normalised colours on the grey square, and the mask."""
    square = padded_square(pixels, size, unit, PAD_COLOUR)
    canvas = np.zeros((4, size, size), dtype=np.float32)
    scaled = (square * np.float32(1 / 255) - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    canvas[:3] = scaled.transpose(2, 0, 1)
    height, width, _ = pixels.shape
    top, left = (((size - side) // unit) // 2 * unit for side in (height, width))
    canvas[3, top : top + height, left : left + width] = 1
    return torch.from_numpy(canvas)


def published(files: list[bytes], workers: int) -> Callable[[], int]:
    """A function for one pass with persistent worker processes; it returns the bytes copied to the device."""
    loader = torch.utils.data.DataLoader(
        Published(files), batch_size=16, num_workers=workers, persistent_workers=True
    )

    def run() -> int:
        return sum(part.nbytes for batch in loader for part in batch)

    return run


def backend(name: str, files: list[bytes], threads: int, gpu: int | None = None) -> Callable[[], int]:
    """A function for one pass in packs of 16 images; it returns the bytes copied to the device."""
    decoder = open_decoder(name, SETTINGS, threads=threads, gpu=gpu)  # type: ignore[arg-type]
    plan = planner({"image_size": IMAGE_SIZE, "teacher_size": TEACHER_SIZE})
    tasks = [ImageTask(data, plan(*Image.open(io.BytesIO(data)).size).views) for data in files]

    def run() -> int:
        total = 0
        for first in range(0, len(tasks), 16):
            for one in decoder.prepare(tasks[first : first + 16]):
                assert isinstance(one, dict)
                total += sum(view.nbytes for view in one.values())
        if gpu is None:
            return total
        torch.cuda.synchronize()
        return sum(map(len, files))

    return run


def ways(files: list[bytes], workers: int) -> dict[str, Callable[[], int]]:
    """{name: function for one pass} for the decoders installed here."""
    found = {"published": published(files, workers), "threads": backend("threads", files, workers)}
    if workers == 1:  # the reference has one thread
        found["pillow"] = backend("pillow", files, workers)
    if dali_is_installed():
        found["dali"] = backend("dali", files, workers)
        if torch.cuda.is_available():
            found["dali on the GPU"] = backend("dali", files, workers, torch.cuda.current_device())
    return found


def main() -> None:
    """Time all decoders in turns and print the table."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=96, help="pictures of a pass")
    options.add_argument(
        "--rounds", type=int, default=5, help="passes of each, after one that is not counted"
    )
    arguments = options.parse_args()
    torch.set_num_threads(1)  # the decoders have their own threads
    header = (
        "pictures", "workers or threads", "way", "images/s", "ratio", "bytes to the device, a picture"
    )  # fmt: skip
    table = Table("decoding", header, arguments.out)
    for width, height in SHAPES[:1] if arguments.toy else SHAPES:
        files = photos(arguments.images, width, height)
        for workers in WORKERS:
            tried = ways(files, workers)
            seconds: dict[str, list[float]] = {name: [] for name in tried}
            sent = {name: way() for name, way in tried.items()}
            for _ in range(arguments.rounds):
                for name, way in tried.items():
                    began = time.perf_counter()
                    way()
                    seconds[name].append(time.perf_counter() - began)
            base = statistics.median(seconds["published"])
            for name, taken in seconds.items():
                middle = statistics.median(taken)
                rate, ratio = f"{len(files) / middle:.0f}", f"{base / middle:.2f}"
                table.add(f"{width}x{height}", workers, name, rate, ratio, f"{sent[name] // len(files):,}")
    if not dali_is_installed():
        table.note("DALI is not installed.")
    elif not torch.cuda.is_available():
        table.note("Without a GPU, DALI decodes on the CPU.")
    table.close()


if __name__ == "__main__":
    main()
