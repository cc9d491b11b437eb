"""A dataset of 33 million rows: time to open it and to the first batch, and memory while it is read.

    python benchmarks/large_index.py --rows 33000000 --steps 100

A small dataset is written as preprocessing writes it, and its rows are repeated until there are enough: records and
row tables have the full size and the real format, while the repeated rows point at the same bytes of text and pictures
(a few GB on disk in all, removed at the end). A new process reads it, from files that were dropped from
the page cache: it opens the dataset, plans and decodes steps as in training, 512 samples per step, at random positions.

Anonymous memory is the memory of the process without pages of mapped files. File pages are those pages; the kernel
reclaims them when memory is needed.
"""

from __future__ import annotations

import dataclasses
import io
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_eve.data.format.indexed import DatasetWriter, IndexedVisionDataset, StoredImage
from megatron_eve.data.format.manifest import IMAGE_DTYPE, MANIFEST, SAMPLE_DTYPE, DatasetSettings, read_info
from megatron_eve.data.images.backends import open_decoder
from megatron_eve.data.pixels import decode_settings
from megatron_eve.data.sampling.loader import StepLoader
from megatron_eve.data.sampling.orders import GroupedOrder, ShuffledOrder, by_modality, split_dataset
from megatron_eve.runtime.command_line import command_parser_of

SMALL_ROWS = 2000
SHAPES = ((640, 480), (480, 640), (640, 427), (640, 360), (512, 512))
GLOBAL_BATCH_SIZE = 512
SEQ_LENGTH = 8192
SETTINGS = DatasetSettings(
    template="plain",
    family="eve",
    image_settings={"image_size": 672, "teacher_size": 336},
    model_max_length=2048,
    apply_exif=False,
    max_pixels=1 << 26,
    tokenizer_sha256="0" * 64,
    vocab_size=32000,
)


def write_small(prefix: Path) -> None:
    """Write captions and noise images in the shapes of web photos; one row in sixteen has no image."""
    random = np.random.default_rng(0)
    pictures = []
    for number in range(64):
        width, height = SHAPES[number % len(SHAPES)]
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        stream = io.BytesIO()
        coarse.resize((width, height)).save(stream, "JPEG", quality=90)
        pictures.append(StoredImage(stream.getvalue(), width, height))
    with DatasetWriter(prefix, SETTINGS) as writer:
        for number in range(SMALL_ROWS):
            images = [pictures[number % 64]] if number % 16 else []
            caption = random.integers(
                3, 32000, int(np.clip(random.lognormal(np.log(130), 0.4), 8, 600))
            ).tolist()
            head = [1, *[-200] * len(images)]
            writer.add_sample([*head, *caption], [*[-100] * len(head), *caption], images)
        writer.finalise()


def repeat(small: Path, large: Path, times: int) -> None:
    """Repeat the rows: records and row tables at full size, while text and image bytes are stored once."""
    info = read_info(str(small))
    for part, dtype in (("_samples.npy", SAMPLE_DTYPE), ("_images.npy", IMAGE_DTYPE)):
        one = np.load(f"{small}{part}")
        many = np.lib.format.open_memmap(f"{large}{part}", "w+", dtype, (len(one) * times,))
        for i in range(times):
            many[i * len(one) : (i + 1) * len(one)] = one
            if part == "_samples.npy":
                many["first_image"][i * len(one) : (i + 1) * len(one)] += i * info.num_images
        many.flush()
    for part, rows in (("_text", info.num_samples), ("_image", info.num_images)):
        os.link(f"{small}{part}.bin", f"{large}{part}.bin")
        with open(f"{small}{part}.idx", "rb") as stream, open(f"{large}{part}.idx", "wb") as out:
            head = stream.read(18)  # magic, version, type
            stream.read(16)
            lengths, starts = np.fromfile(stream, "<i4", rows), np.fromfile(stream, "<i8", rows)
            out.write(head + struct.pack("<QQ", rows * times, rows * times + 1))
            for column in (lengths, starts):
                for _ in range(times):
                    column.tofile(out)
            np.arange(rows * times + 1, dtype="<i8").tofile(out)
    many_rows = {name: getattr(info, name) * times for name in
                 ("num_samples", "num_images", "num_tokens", "num_text_tokens", "num_labels", "num_rows")}  # fmt: skip
    Path(f"{large}{MANIFEST}").write_text(dataclasses.replace(info, **many_rows).to_json())
    for path in large.parent.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory() -> tuple[float, float]:
    """Anonymous memory and file pages of this process, MiB."""
    lines = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    anonymous, files = (int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
    return anonymous, files


def read(prefix: str, steps: int) -> None:
    """Open the dataset, plan and build steps, and print times and memory; runs in the new process."""
    import megatron.core.datasets.indexed_dataset  # noqa: F401 (its import takes seconds and is not what is timed)

    base = memory()
    start = time.perf_counter()
    dataset = IndexedVisionDataset(prefix)
    sizes = {"image_size": 672, "teacher_size": 336}
    dataset.check_compatible(tokenizer_sha256=None, vocab_size=32000, family="eve", image_settings=sizes)
    opened = time.perf_counter() - start
    after = memory()
    size = sum(path.stat().st_size for path in Path(prefix).parent.glob(Path(prefix).name + "_*"))
    print(f"{len(dataset):,} rows, {dataset.info.num_images:,} images, {size / 1e9:.1f} GB of files")
    print(f"opened in {1000 * opened:.1f} ms; memory {after[0] - base[0]:+.1f} MiB anonymous, "
          f"{after[1] - base[1]:+.1f} MiB file pages")  # fmt: skip

    start = time.perf_counter()
    part, _ = split_dataset("set", 0, len(dataset), 0.0)
    loader = StepLoader(
        dataset,
        ShuffledOrder([part], seed=1),
        global_batch_size=GLOBAL_BATCH_SIZE,
        seq_length=SEQ_LENGTH,
        data_parallel_rank=0,
        data_parallel_size=8,
        views=["patches"],
        decoder=open_decoder("threads", decode_settings(dataset), threads=2, gpu=None),
    )
    first = loader.step(len(dataset) // 3)
    planned = time.perf_counter() - start
    assert "patches" in first.batches[0].pixels
    built = time.perf_counter() - start
    print(f"first step planned after {1000 * planned:.1f} ms, its first batch of "
          f"{len(first.batches[0].image_grids)} pictures there after {1000 * built:.0f} ms")  # fmt: skip

    print(f"{'steps read':>10} {'anonymous MiB':>14} {'file pages MiB':>15}")
    consumed, begun = 0, time.perf_counter()
    for number in range(1, steps + 1):
        for _ in loader.step(consumed).batches:
            pass
        consumed += GLOBAL_BATCH_SIZE
        if number in {1, 5, steps // 4, steps // 2, 3 * steps // 4, steps}:
            anonymous, files = memory()
            print(f"{number:>10} {anonymous:14.1f} {files:15.1f}", flush=True)
    print(f"{(time.perf_counter() - begun) / steps:.2f} s a step of this rank")
    loader.close()

    start = time.perf_counter()
    members = by_modality(dataset.samples, [part])
    took = time.perf_counter() - start
    order = GroupedOrder([part], members, GLOBAL_BATCH_SIZE, seed=1)
    start = time.perf_counter()
    order(np.arange(GLOBAL_BATCH_SIZE))
    print(f"--group-by-modality: list of {members.nbytes / 2**20:.0f} MiB made in {took:.1f} s (once, with "
          f"--data-cache-path), order of a step in {1000 * (time.perf_counter() - start):.2f} ms")  # fmt: skip


def main() -> None:
    """Write the dataset and read it in a new process."""
    parser = command_parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=33_000_000, help="rows, rounded to whole repetitions")
    parser.add_argument(
        "--steps", type=int, default=100, help=f"steps of {GLOBAL_BATCH_SIZE} samples that are read"
    )
    parser.add_argument(
        "--folder", metavar="DIR", help="where to write (default: the system's temporary folder)"
    )
    parser.add_argument("--read", metavar="PREFIX", help="read this dataset, and write none")
    arguments = parser.parse_args()
    if arguments.read:
        read(arguments.read, arguments.steps)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        (folder / "small").mkdir()
        (folder / "large").mkdir()
        write_small(folder / "small" / "set")
        repeat(folder / "small" / "set", folder / "large" / "set", -(-arguments.rows // SMALL_ROWS))
        again = [__file__, "--steps", str(arguments.steps), "--read", str(folder / "large" / "set")]
        subprocess.run([sys.executable, "-W", "ignore", *again], check=True)


if __name__ == "__main__":
    main()
