"""Codes of pictures: images a second of tools/tokenize_images.py, by tower, precision and number of processes.

    python benchmarks/tokenizing.py --images 24 --out tables
    python benchmarks/tokenizing.py --tower models/tower --images 2000
    python benchmarks/tokenizing.py --toy

Photos of 640x480, about 80 kB each, in a dataset of their files. Without --tower two towers with random weights are
written to a temporary folder: a small one of 64 pixels, and one with the sizes of the published 256-pixel VILA-U. Rates
are those of the command, from when the first process has loaded its tower; with a GPU there is one process for it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_common import parser, photos
from tables import Table

from megatron_eve.data.format.code_writer import CodeWork
from megatron_eve.data.format.indexed import DatasetWriter, StoredImage
from megatron_eve.data.tokenizing.flags import tower_family
from megatron_eve.data.tokenizing.tokenize import code_settings
from megatron_eve.data.tokenizing.worker import make_codes
from tests.data.helpers import MINI_SETTINGS
from tests.models.vila_u.towers import CONFIG, SIGLIP, changed, write_tower
from tools.tokenize_images import build_parser, tokenize_config

SMALL = 100  # times as many photos for the small tower
ROOT = Path(__file__).resolve().parents[1]
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "64 pixels, 4 layers of width 32, 4 x 4 x 4 codes": (
        changed(
            CONFIG, ch_mult=[1, 1, 1, 1, 2], resolution=64, n_embed=1024,
        ),
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16},
    ),
    "256 pixels, 24 layers of width 1024, 16 x 16 x 4 codes": (
        changed(
            CONFIG, ch=128, ch_mult=[1, 1, 2, 2, 4], num_res_blocks=2, attn_resolutions=[16], z_channels=256,
            resolution=256, embed_dim=1024, n_embed=16384, latent_shape=[16, 16, 1024], code_shape=[16, 16, 4],
        ),
        {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "image_size": 256, "patch_size": 16,
        },
    ),
}  # fmt: skip


def tokenize(words: list[str]) -> str:
    """Run the command; images a second, as it says."""
    command = [sys.executable, "tools/tokenize_images.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = re.search(r"([\d,.]+) images/s$", done.stdout, re.MULTILINE)
    if found is None:
        sys.exit(done.stdout + done.stderr)
    return found[1]


def main() -> None:
    """Measure and print."""
    flags_parser = parser(__doc__)
    flags_parser.add_argument(
        "--images", type=int, default=24, help="photos; of the small tower a hundred times as many"
    )
    flags_parser.add_argument("--tower", type=Path, metavar="DIR", help="a real tower (default: random ones)")
    flags_parser.add_argument(
        "--micro-batch-size", dest="batch", type=int, default=4, help="as of the command"
    )
    flags = flags_parser.parse_args()
    header = ("tower", "precision", "images", "CPU ms an image", "images/s, 1 process", "2 processes")
    table = Table("Codes of pictures", header, flags.out)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, (title, tower) in enumerate(find_towers(flags.tower, folder, flags.toy)):
            count = flags.images * (1 if number or flags.tower else SMALL)
            count, data = 6 if flags.toy else count, str(folder / f"photos{number}")
            write_photos(data, count)
            for dtype in ("float32", "bfloat16"):
                words = ["--tower", str(tower), "--input", data, "--dtype", dtype]
                words += ["--micro-batch-size", str(flags.batch), "--output-prefix"]
                milliseconds = cpu_milliseconds([*words, f"{data}_cpu_{dtype}"]) / count
                both = ("1",) if torch.cuda.is_available() else ("1", "2")
                rates = [tokenize([*words, f"{data}_{n}_{dtype}", "--workers", n]) for n in both]
                table.add(title, dtype, count, f"{milliseconds:,.1f}", *rates, *["-"] * (2 - len(rates)))
    table.close()


def cpu_milliseconds(words: list[str]) -> float:
    """CPU time of one process for all images, without loading the tower: other work on the machine is not in it."""
    family = tower_family(words)
    config = tokenize_config(build_parser(family).parse_args(words), family)
    times: list[float] = []
    with CodeWork(config.output_prefix, code_settings(config), overwrite=False) as work:
        make_codes(config, work, lambda _: times.append(time.process_time()))
    return 1000 * (times[-1] - times[0])


def write_photos(prefix: str, count: int) -> None:
    """Write a dataset of photos; some of them come several times."""
    files = photos(min(count, 24), 640, 480)
    with DatasetWriter(prefix, MINI_SETTINGS) as writer:
        for number in range(count):
            photo = StoredImage(files[number % len(files)], 640, 480)
            writer.add_sample([1, -200, 5], [-100, -100, 5], [photo])
        writer.finalise()


def find_towers(given: Path | None, folder: Path, toy: bool) -> Iterator[tuple[str, Path]]:
    """The towers to measure, each by a title."""
    if given is not None:
        yield given.name, given
        return
    for number, (title, (config, vision)) in enumerate(SIZES.items()):
        if number and toy:
            return
        siglip = {**SIGLIP, "vision_config": {**SIGLIP["vision_config"], **vision}}
        yield title, write_tower(folder / f"tower{number}", config, siglip, copies=False)


if __name__ == "__main__":
    main()
