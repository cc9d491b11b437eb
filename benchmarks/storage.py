"""Cost of storing images as files, smaller JPEG files or pixels: bytes, time to make and read, difference.

    python benchmarks/storage.py --images 6 --rounds 5 --out tables
    python benchmarks/storage.py --toy

Images are made (`data/images/storage.py`), written to a dataset and read with the `build_batch` of training, each with
one thread; medians of rounds in which all cases take turns. "encoded" is made by Pillow, which validates each file. The
difference is the mean in 8-bit levels from the patches that Pillow gives for the original file. A second table has, for
storages that decode, the images made per second, the fraction of that time spent on encoding JPEG (always on the CPU),
and the PCIe transfers per image if DALI decodes on a GPU: the file to the GPU, patches (and the teacher's image) back.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import simplejpeg
import torch
from gpu_common import parser, photos
from PIL import Image
from tables import Table

from megatron_eve.data.batch import PackedBatch, build_batch
from megatron_eve.data.format.indexed import DatasetSettings, DatasetWriter, IndexedVisionDataset, StoredImage
from megatron_eve.data.images import decode_image
from megatron_eve.data.images.backends import open_decoder
from megatron_eve.data.images.interface import DecodeSettings, ImageDecoder
from megatron_eve.data.images.pillow import PillowDecoder
from megatron_eve.data.images.resizing import resize
from megatron_eve.data.images.storage import ImageStore, StorageSettings
from megatron_eve.models.family import View
from megatron_eve.models.model_parts import ImageShare
from megatron_eve.models.registry import find_family
from megatron_eve.runtime.dali import dali_is_installed

CASES = ((640, 480, 672), (1600, 1200, 672), (1600, 1200, 1344))
DECODE = DecodeSettings(apply_exif=False, max_pixels=89_478_485)
TEACHER_SIZE = 336
# Name, image storage, quality, subsampling.
WAYS = (
    ("encoded", "encoded", 90, "420"),
    ("jpeg q90 4:2:0", "jpeg", 90, "420"),
    ("jpeg q95 4:4:4", "jpeg", 95, "444"),
    ("pixels", "pixels", 90, "420"),
)


class Way:
    """One image storage, with the decoder that makes and reads it."""

    def __init__(
        self,
        folder: Path,
        way: tuple[str, str, int, str],
        decoder: Literal["threads", "dali"],
        image_size: int,
    ) -> None:
        self.name, storage, quality, subsampling = way
        self.decoder = decoder
        gpu = 0 if decoder == "dali" and torch.cuda.is_available() else None
        self.reader: ImageDecoder = open_decoder(decoder, DECODE, threads=1, gpu=gpu)
        self._prefix = folder / f"{self.name} {decoder}".replace(" ", "_").replace(":", "")
        self._settings = DatasetSettings(
            template="plain", family="eve", image_settings={"image_size": image_size, "teacher_size": TEACHER_SIZE},
            model_max_length=2048, apply_exif=False,
            max_pixels=DECODE.max_pixels, tokenizer_sha256="", vocab_size=384, image_storage=storage,
        )  # fmt: skip
        sizes = {"image_size": image_size, "teacher_size": TEACHER_SIZE, "teacher_patch_size": 14}
        self._planner = find_family("eve").image_planner(sizes)
        self._store: ImageStore | None = None
        self.as_jpeg = storage == "jpeg"
        if storage != "encoded":
            self._how = StorageSettings(
                image_storage=storage, image_decoder=decoder, family="eve", image_settings=sizes, decode=DECODE,
                jpeg_quality=quality, jpeg_subsampling=subsampling,
            )  # fmt: skip
            self._store = ImageStore(self._how, workers=os.cpu_count() or 1)

    def make(self, files: list[bytes]) -> list[StoredImage]:
        """The images as they are stored."""
        if self._store is None:
            sizes = [
                decode_image(data, apply_exif=False, max_pixels=DECODE.max_pixels).size for data in files
            ]
            return [StoredImage(data, *size) for data, size in zip(files, sizes, strict=True)]
        return [image for image in self._store.store(files) if isinstance(image, StoredImage)]

    def decoded(self, files: list[bytes]) -> list[tuple[Image.Image, Mapping[str, View]]]:
        """The pictures that are decoded into the dataset: "jpeg" enlarges none and keeps their files."""
        found = []
        for data in files:
            image = decode_image(data, apply_exif=False, max_pixels=DECODE.max_pixels)
            views = self._planner(*image.size).views
            model = views["patches"]
            if not self.as_jpeg or (model.width <= image.width and model.height <= image.height):
                found.append((image, views))
        return found

    def encoding_seconds(self, files: list[bytes]) -> float:
        """Seconds spent on JPEG encoding alone."""
        seconds = 0.0
        for image, views in self.decoded(files) if self.as_jpeg else ():
            pixels = resize(image, views["patches"].width, views["patches"].height)
            began = time.perf_counter()
            simplejpeg.encode_jpeg(
                pixels, quality=self._how.jpeg_quality, colorspace="RGB", colorsubsampling=self._how.jpeg_subsampling
            )  # fmt: skip
            seconds += time.perf_counter() - began
        return seconds

    def write(self, files: list[bytes]) -> IndexedVisionDataset:
        """Write a dataset with one sample for each file."""
        made_with = self._how.made_with() if self._store else None
        with DatasetWriter(self._prefix, self._settings, made_with) as writer:
            for image in self.make(files):
                writer.add_sample([1, -200, 5], [-100, -100, 5], [image])
            writer.finalise()
        return IndexedVisionDataset(self._prefix)


def read(dataset: IndexedVisionDataset, decoder: ImageDecoder, teacher: bool) -> PackedBatch:
    """Read all images as one pack."""
    return build_batch(
        dataset, range(len(dataset)), tensor_parallel=1, context_parallel=1, views=["patches"],
        shared_views=["teacher"] if teacher else [], share=ImageShare(0, 1), decoder=decoder,
    )  # fmt: skip


def made_row(case: str, way: Way, files: list[bytes], times: dict[str, float]) -> tuple[str, ...]:
    """A row of the second table, from milliseconds per image."""
    over_pcie = "none"
    if way.decoder == "dali" and torch.cuda.is_available():
        decoded = [dict(list(views.items())[: 1 if way.as_jpeg else None]) for _, views in way.decoded(files)]
        back = sum(math.prod(view.shape) for views in decoded for view in views.values()) // len(files)
        over_pcie = f"{len(decoded) * sum(map(len, files)) // len(files) ** 2:,} there, {back:,} back"
    made, share = f"{1000 / times['make']:.0f}", f"{times['encoding'] / times['make']:.0%}"
    return case, way.name, way.decoder, made, share, over_pcie


def main() -> None:
    """Time all cases in turns and print both tables."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=6, help="pictures of a pass")
    options.add_argument("--rounds", type=int, default=5, help="passes, after one that is not counted")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    header = (
        "picture, model", "storage", "decoder", "bytes a picture", "ms to make", "ms to read patches",
        "ms with the teacher's square", "levels",
    )  # fmt: skip
    table = Table("storage", header, arguments.out)
    rows: list[tuple[str, ...]] = []
    decoders: tuple[Literal["threads", "dali"], ...] = (
        ("threads", "dali") if dali_is_installed() else ("threads",)
    )
    for width, height, image_size in CASES[:1] if arguments.toy else CASES:
        files = photos(arguments.images, width, height)
        with tempfile.TemporaryDirectory() as folder:
            ways = [Way(Path(folder), way, decoder, image_size) for way in WAYS for decoder in decoders]
            datasets = [way.write(files) for way in ways]
            reference = read(datasets[0], PillowDecoder(DECODE), False).pixels["patches"]
            taken: dict[tuple[int, str], list[float]] = defaultdict(list)
            levels = []
            for way, dataset in zip(ways, datasets, strict=True):
                found = read(dataset, way.reader, True).pixels["patches"]
                levels.append(float((found.cpu().int() - reference.int()).abs().float().mean()))
            for _ in range(arguments.rounds):
                for number, (way, dataset) in enumerate(zip(ways, datasets, strict=True)):
                    began = time.perf_counter()
                    way.make(files)
                    made = time.perf_counter()
                    read(dataset, way.reader, False)
                    patched = time.perf_counter()
                    read(dataset, way.reader, True)
                    squared = time.perf_counter()
                    for name, seconds in (
                        ("make", made - began), ("patches", patched - made), ("square", squared - patched)
                    ):  # fmt: skip
                        taken[number, name].append(1000 * seconds / len(files))
                    taken[number, "encoding"].append(1000 * way.encoding_seconds(files) / len(files))
            for number, (way, dataset) in enumerate(zip(ways, datasets, strict=True)):
                times = [
                    f"{statistics.median(taken[number, name]):.1f}" for name in ("make", "patches", "square")
                ]
                size = f"{dataset.info.stored_bytes // len(files):,}"
                table.add(
                    f"{width}x{height}, {image_size}",
                    way.name,
                    way.decoder,
                    size,
                    *times,
                    f"{levels[number]:.2f}",
                )
                if way.name != "encoded":  # which decodes nothing
                    medians = {name: statistics.median(taken[number, name]) for name in ("make", "encoding")}
                    rows.append(made_row(f"{width}x{height}, {image_size}", way, files, medians))
    if not torch.cuda.is_available():
        table.note("No GPU here: DALI decoded on the CPU, and GPU rows are missing.")
    table.close()
    columns = (
        "picture, model",
        "storage",
        "decoder",
        "images/s made",
        "of it encoding JPEG",
        "bytes over PCIe a picture",
    )
    making = Table("storage, making", columns, arguments.out)
    for row in rows:
        making.add(*row)
    making.close()


if __name__ == "__main__":
    main()
