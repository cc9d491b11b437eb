"""Duplicates among 33 million rows: time, memory, and how many of the planted copies are found.

    python benchmarks/duplicates.py --rows 33000000

Tables of the stage `filter` are made up: 15 % of the rows are near copies of earlier ones (0 to `--distance` bits
differ), 5 % exact copies, 0.5 % pictures of one colour, and 10 % pictures that share a template (documents, product
photos): each bit of the template's hash differs with a probability of 15 %. The other hashes are random numbers with 32
bits set, as half of the coefficients lie above their median. A new process reads the tables and finds the copies.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import parquet

from megatron_eve.curation.duplicates import COLUMNS, dropped_tables, find_copies, gather
from megatron_eve.curation.hashes import HASH_BITS
from megatron_eve.curation.near_duplicates import MAX_DISTANCE
from megatron_eve.runtime.command_line import command_parser_of

ROWS_PER_SHARD = 100_000
ROWS_PER_TEMPLATE = 3_300
KINDS = ("other", "near copies", "exact copies", "one colour")
NEAR, EXACT, PLAIN, TEMPLATE = 0.15, 0.05, 0.005, 0.10


def random_hashes(random: np.random.Generator, count: int) -> NDArray[np.uint64]:
    """Random hashes of which 32 bits are set."""
    hashes = np.empty(count, np.uint64)
    for start in range(0, count, ROWS_PER_SHARD):
        values = random.random((min(ROWS_PER_SHARD, count - start), HASH_BITS), dtype=np.float32)
        bits = values > np.median(values, axis=1, keepdims=True)
        hashes[start : start + ROWS_PER_SHARD] = np.packbits(bits, axis=1).view(">u8")[:, 0]
    return hashes


def with_flips(
    random: np.random.Generator, hashes: NDArray[np.uint64], flips: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """The hashes with so many different random bits changed."""
    result = hashes.copy()
    for start in range(0, len(hashes), ROWS_PER_SHARD):
        some = slice(start, start + ROWS_PER_SHARD)
        places = random.random((len(flips[some]), HASH_BITS), dtype=np.float32).argsort(axis=1)
        changed = np.packbits(places < flips[some, None], axis=1).view(">u8")[:, 0]
        result[some] ^= changed.astype(np.uint64)
    return result


class MadeUp(NamedTuple):
    """Rows in random order."""

    phash: NDArray[np.uint64]
    word: NDArray[np.uint64]
    """A quarter of the digest; all its quarters are equal."""
    kind: NDArray[np.int64]
    """Number in `KINDS`."""
    original: NDArray[np.int64]
    """Number of the row that it was copied from, before or after it; its own number for others."""


def make_up(rows: int, distance: int) -> MadeUp:
    """Make up the hashes of all rows."""
    random = np.random.default_rng(0)
    near, exact, plain, template = (int(rows * share) for share in (NEAR, EXACT, PLAIN, TEMPLATE))
    others = rows - near - exact - plain
    hashes = random_hashes(random, others)
    templates = np.repeat(random_hashes(random, -(-template // ROWS_PER_TEMPLATE)), ROWS_PER_TEMPLATE)
    hashes[:template] = with_flips(random, templates[:template], random.binomial(HASH_BITS, 0.15, template))
    digests = random.integers(0, 1 << 64, others, dtype=np.uint64)
    copied = random.integers(0, others, exact)
    changed = random.integers(template, others, near)
    near_hashes = with_flips(random, hashes[changed], random.integers(0, distance + 1, near))
    all_hashes = [hashes, near_hashes, hashes[copied], np.full(plain, 1 << 63, np.uint64)]
    new_digests = random.integers(0, 1 << 64, near + plain, dtype=np.uint64)
    all_digests = [digests, new_digests[:near], digests[copied], new_digests[near:]]
    kinds = np.repeat([0, 1, 2, 3], [others, near, exact, plain])
    original = np.concatenate([np.arange(others), changed, copied, np.arange(rows - plain, rows)])
    order = random.permutation(rows)
    place = np.empty_like(order)
    place[order] = np.arange(rows)
    return MadeUp(
        np.concatenate(all_hashes)[order],
        np.concatenate(all_digests)[order],
        kinds[order],
        place[original[order]],
    )


def write_tables(folder: Path, rows: int, distance: int) -> None:
    """Write tables of the stage `filter`, and what each row is."""
    made = make_up(rows, distance)
    np.save(folder / "kinds.npy", made.kind.astype(np.uint8))
    np.save(folder / "originals.npy", made.original)
    for shard, start in enumerate(range(0, rows, ROWS_PER_SHARD)):
        words = np.repeat(made.word[start : start + ROWS_PER_SHARD, None], 4, axis=1)
        sha256 = pyarrow.FixedSizeBinaryArray.from_buffers(
            pyarrow.binary(32), len(words), [None, pyarrow.py_buffer(words.tobytes())]
        )
        columns = {
            "row": np.arange(len(words)),
            "reason": pyarrow.nulls(len(words), pyarrow.string()),
            "sha256": sha256,
            "phash": made.phash[start : start + ROWS_PER_SHARD],
        }
        parquet.write_table(pyarrow.table(columns), folder / f"{shard:05d}.parquet")


def memory() -> float:
    """Most memory that this process has had, GiB (`ru_maxrss` begins with that of the process that started it)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(peak.split()[1]) / 2**20


def measure(folder: Path, distance: int) -> None:
    """Find the copies and print times, memory and counts; runs in the new process."""
    kinds = np.load(folder / "kinds.npy", mmap_mode="r")
    files = sorted(folder.glob("*.parquet"))
    tables = (parquet.read_table(file, columns=list(COLUMNS)) for file in files)

    def done(what: str, start: tuple[float, float]) -> tuple[float, float]:
        now = time.perf_counter(), time.process_time()
        print(
            f"{what:<28}{now[0] - start[0]:8.1f} s, {now[1] - start[1]:8.1f} s of CPU time, at most {memory():.2f} GiB",
            flush=True,
        )
        return now

    print(f"{len(kinds):,} rows in {len(files)} tables; {memory():.2f} GiB before", flush=True)
    now = time.perf_counter(), time.process_time()
    rows = gather(tables, len(kinds))
    now = done("tables read", now)
    exact_only = find_copies(rows, None)
    now = done("exact copies found", now)
    del exact_only
    copies = find_copies(rows, distance)
    now = done("exact and near copies found", now)
    dropped = sum(len(table) for table in dropped_tables(rows, copies))
    done(f"{dropped:,} rows written", now)
    originals = np.load(folder / "originals.npy", mmap_mode="r")
    for kind, name in enumerate(KINDS):
        of_kind = np.flatnonzero(kinds == kind)
        gone = copies.of >= 0
        both = int((~gone[of_kind] & ~gone[originals[of_kind]]).sum()) if kind in (1, 2) else 0
        exact = int(copies.exact[of_kind].sum())
        near = int(gone[of_kind].sum()) - exact
        print(
            f"{name:<14}{len(of_kind):>12,} rows, dropped as exact {exact:>10,}, as near {near:>10,}; "
            f"kept together with their originals: {both:,}"
        )


def main() -> None:
    """Write the tables and measure in a new process."""
    parser = command_parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=33_000_000, help="rows of all tables together")
    parser.add_argument(
        "--distance",
        type=int,
        choices=range(1, MAX_DISTANCE + 1),
        default=6,
        help="bits in which near copies differ",
    )
    parser.add_argument(
        "--folder", metavar="DIR", help="where to write (default: the system's temporary folder)"
    )
    parser.add_argument("--measure", metavar="DIR", type=Path, help="use the tables of this folder")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.distance)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        write_tables(Path(name), arguments.rows, arguments.distance)
        again = [__file__, "--distance", str(arguments.distance), "--measure", name]
        subprocess.run([sys.executable, *again], check=True)


if __name__ == "__main__":
    main()
