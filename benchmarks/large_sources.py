"""Preprocessing of large files: a JSON array of 4 GB, a parquet file of a million rows, a tar of 50,000 members.

    python benchmarks/large_sources.py --json-gb 4 --parquet-rows 1000000 \\
        --tar-members 50000 --out tables
    python benchmarks/large_sources.py --toy

Each file is made, preprocessed by tools/preprocess_data.py with two workers, and removed with its dataset before the
next. A file of a hundredth of its size comes first: peak memory should be the same. Needs about 10 GB of disk.

"Peak" is VmHWM of Linux, "anonymous" the largest RssAnon sampled (ten times a second); for workers, the largest worker.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from command_cost import Memory, run_preprocess
from gpu_common import parser, photos
from preprocessing_inputs import Input, Maker, tokenizer
from tables import Table

_NOTES = 38_000  # bytes of a key that becomes metadata
_ROW = 40_000  # approximate bytes of a row of JSON


def json_array(folder: Path, size: float) -> Input:
    """Rows of 40 kB in the LLaVA layout: an answer of 1,650 characters, most of the rest in an additional key."""
    maker = Maker(folder, photos(8, 96, 72))
    path = folder / "llava.json"
    rows = max(int(size / _ROW), 1)
    turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": "A red car. " * 150}]
    with path.open("w") as file:
        for number in range(rows):
            row = {"id": number, "image": f"{number % 8}.jpg", "conversations": turns, "notes": "n" * _NOTES}
            file.write(("[" if number == 0 else ",\n") + json.dumps(row))
        file.write("]")
    return maker.named("JSON array", path, rows, rows)


def main() -> None:
    """Preprocess all inputs and print the table."""
    options = parser(__doc__)
    options.add_argument("--json-gb", type=float, default=4.0, help="size of the JSON array, 10^9 bytes")
    options.add_argument(
        "--parquet-rows", type=int, default=1_000_000, help="rows of the parquet file, images of 2 kB"
    )
    options.add_argument(
        "--tar-members",
        type=int,
        default=50_000,
        help="members of the tar, images of 80 kB",
    )
    options.add_argument(
        "--folder", metavar="DIR", help="where to write (default: the system's temporary folder)"
    )
    arguments = options.parse_args()
    small = 1000 if arguments.toy else 1
    gigabytes, rows, members = (
        arguments.json_gb / small, arguments.parquet_rows // small, arguments.tar_members // small
    )  # fmt: skip
    makers: tuple[tuple[str, Callable[[Path, float], Input]], ...] = (
        (f"JSON array, {gigabytes:g} GB", lambda folder, part: json_array(folder, gigabytes * 1e9 * part)),
        (
            f"parquet, {rows:,} rows",
            lambda folder, part: Maker(folder, photos(8, 96, 72)).parquet_hub(int(rows * part) or 1, 1000),
        ),
        (
            f"tar, {members:,} members",
            lambda folder, part: Maker(folder, photos(8, 640, 480)).webdataset(int(members / 3 * part) or 1),
        ),
    )
    header = (
        "source", "size", "input, MB", "rows", "s", "CPU s", "parent: peak (anonymous), MiB",
        "worker: peak (anonymous), MiB",
    )  # fmt: skip
    table = Table("large sources", header, arguments.out)
    for name, make in makers:
        for part, size in ((0.01, "a hundredth"), (1, "whole")):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as written:
                folder = Path(written)
                given = make(folder / "input", part)
                settings = {
                    **given.settings, "tokenizer_model": tokenizer(folder), "workers": 2,
                    "output_prefix": folder / "out" / "set",
                }  # fmt: skip
                cost = run_preprocess(settings, memory=True)
                read = Path(given.settings["input"]).stat().st_size
                table.add(
                    name, size, f"{read / 1e6:,.0f}", f"{given.rows:,}", f"{cost.seconds:.0f}", f"{cost.cpu:.0f}",
                    _memory_cell(cost.parent), _memory_cell(cost.worker),
                )  # fmt: skip
    table.close()


def _memory_cell(memory: Memory) -> str:
    return f"{memory.resident:.0f} ({memory.anonymous:.0f})"


if __name__ == "__main__":
    main()
