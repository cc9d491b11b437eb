"""Clusters: work of K-means, of assignment and of selection, measured at small sizes and projected to large ones.

    python benchmarks/clusters.py
    python benchmarks/clusters.py --width 1024 --centres 4000

Features are random directions of the given width, in float16 as the stage `features` writes them. What is measured is
CPU time, so that other work on the machine changes little. K-means and assignment compare every vector with every
centre, 2 x width x centres operations for each, so their cost at other sizes follows from the operations per second;
that of selection from the rows.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_eve.curation.clusters import CHOSEN, NearestCentre, NearestRows, train_centres, unit_length
from megatron_eve.curation.feature_files import write_chosen
from megatron_eve.curation.inputs import Inputs
from megatron_eve.curation.work import Work
from megatron_eve.runtime.command_line import command_parser_of

PICTURES = (15_000_000, 50_000_000, 400_000_000)
CENTRES, PER_CENTRE, POINTS_PER_CENTRE, ROUNDS = 50_000, 300, 64, 20


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of all threads of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def directions(count: int, width: int, seed: int) -> NDArray[np.float32]:
    """Random vectors of length 1."""
    return unit_length(np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32))


def measure_assignment(width: int, centres: int, vectors: int) -> float:
    """Print CPU seconds of an assignment, the least of three; returns them for one vector."""
    nearest = NearestCentre(directions(centres, width, 0))
    features = directions(vectors, width, 1).astype(np.float16)
    seconds = min(cpu_seconds(lambda: nearest(features)) for _ in range(3))
    rate = 2 * width * centres * vectors / seconds
    print(f"| assign, {vectors:,} to {centres:,} | {seconds:.2f} | {rate / 1e9:.0f} |", flush=True)
    return seconds / vectors


def measure_training(width: int, centres: int, rounds: int) -> float:
    """Print operations per CPU second of K-means; returns them."""
    points = directions(centres * POINTS_PER_CENTRE, width, 2)
    cosines: list[float] = []
    seconds = cpu_seconds(lambda: cosines.extend(train_centres(points, centres, rounds, seed=0)[1]))
    rate = 2 * width * centres * len(points) * len(cosines) / seconds
    name = f"K-means, {len(points):,} to {centres:,}, {len(cosines)} rounds"
    print(f"| {name} | {seconds:.2f} | {rate / 1e9:.0f} |", flush=True)
    return rate


def measure_selection(rows: int, centres: int, per_centre: int) -> tuple[float, float]:
    """Print CPU seconds to select of tables in memory; returns microseconds and bytes on disk of a row."""
    random = np.random.default_rng(3)
    nearest, shard_rows, seconds = NearestRows(centres, per_centre), 50_000, 0.0
    for shard in range(rows // shard_rows):
        table = np.zeros(shard_rows, CHOSEN)
        table["shard"], table["row"] = shard, np.arange(shard_rows)
        table["centre"] = random.integers(0, centres, shard_rows)
        table["distance"] = random.beta(8, 12, shard_rows)

        def add(table: NDArray[np.void] = table) -> None:
            nearest.add(table)

        seconds += cpu_seconds(add)
    seconds += cpu_seconds(nearest.result)
    name = f"select, {rows:,} rows, {per_centre} of each of {centres:,}"
    print(f"| {name} | {seconds:.2f} | |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), Inputs((), (), ()))
        work.stage_folder("assign").mkdir()
        write_chosen(work, "assign", 0, table)
        size = work.table("assign", 0).stat().st_size
    return 1e6 * seconds / rows, size / shard_rows


def project(
    width: int, training: float, assignment: Callable[[int], float], selection: float, row_bytes: float
) -> None:
    """Print what clusters cost at sizes of published data sets.

    Args:
        width: of a feature.
        training: operations of K-means in a CPU second.
        assignment: CPU seconds to assign one picture, by number of centres.
        selection: CPU microseconds to select, for each picture.
        row_bytes: bytes of a row of the tables of assign.
    """
    points = CENTRES * POINTS_PER_CENTRE
    hours = 2 * width * CENTRES * points * ROUNDS / training / 3600
    print(
        f"\n{CENTRES:,} centres of {width}: trained on {points:,} pictures, {4 * width * points / 1e9:.1f} GB in "
        f"memory, in {ROUNDS} rounds: {hours:.1f} core hours; centres {4 * width * CENTRES / 1e6:.0f} MB\n"
    )
    print("| pictures | features, GB | assign, core hours | assign tables, GB | select, core minutes |")
    print("|---|---|---|---|---|")
    for count in PICTURES:
        print(
            f"| {count:,} | {2 * width * count / 1e9:.0f} | {assignment(CENTRES) * count / 3600:.1f} | "
            f"{row_bytes * count / 1e9:.2f} | {selection * count / 6e7:.1f} |"
        )
    entries = 2 * CENTRES * PER_CENTRE
    size = entries * CHOSEN.itemsize / 1e6
    print(f"\nselect holds at most {entries:,} rows of {CHOSEN.itemsize} bytes: {size:.0f} MB")


def main() -> None:
    """Measure, then project."""
    parser = command_parser_of(__doc__)
    parser.add_argument("--width", type=int, default=1024, help="numbers of a feature")
    parser.add_argument("--centres", type=int, default=2000, help="fewest centres of an assignment")
    parser.add_argument("--vectors", type=int, default=8192, help="vectors that are assigned")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of K-means that are measured")
    parser.add_argument("--rows", type=int, default=2_000_000, help="rows of the selection")
    flags = parser.parse_args()
    print("| work | CPU s | GFLOP/s a core |\n|---|---|---|")
    sizes = [flags.centres * factor for factor in (1, 2, 4)]
    times = [measure_assignment(flags.width, centres, flags.vectors) for centres in sizes]
    slope, fixed = np.polyfit(sizes, times, 1)
    rate = 2 * flags.width / slope / 1e9
    print(f"| assign: slope in the centres; {1e6 * fixed:.0f} microseconds a vector beside | | {rate:.0f} |")
    training = measure_training(flags.width, flags.centres // 2, flags.rounds)
    selection, row_bytes = measure_selection(flags.rows, flags.rows // 600, PER_CENTRE)
    project(flags.width, training, lambda centres: fixed + slope * centres, selection, row_bytes)


if __name__ == "__main__":
    main()
