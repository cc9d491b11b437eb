"""Cost of preprocessing: sources and image storages with 1 and 2 processes, the parent process, the start-up.

    python benchmarks/preprocessing.py --rounds 5 --rows 1152 --out tables
    python benchmarks/preprocessing.py --toy

Rows are made in a temporary folder and preprocessed by tools/preprocess_data.py; every figure is the median of rounds
in which all cases take turns. Images are 640x480 and about 80 kB (sources), 1600x1200 and about 500 kB (storage);
captions have 600 characters; the tokenizer is that of the quickstart, with 512 pieces. CPU seconds are those of the
process and its workers. The start-up, measured on one row, has its own table and is subtracted in all others.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_cost import CommandCost, preprocess_command, run_command, run_preprocess
from gpu_common import parser
from preprocessing_inputs import Input, Maker, all_sources, large_photos, tokenizer
from tables import Table

from megatron_eve.runtime.dali import dali_is_installed

PROCESSES = (1, 2)
LARGE = (1600, 1200)
LARGE_ROWS = 12  # rows of a source per large photo, which takes longer
TEXT_ROWS = 12  # rows without decoding per row with an image


@dataclass(frozen=True)
class Case:
    """One run of the command: input, image storage and number of processes.

    Attributes:
        start: key of the start-up that is subtracted, see `starts`.
    """

    name: str
    given: Input
    settings: dict[str, Any]
    processes: int

    @property
    def start(self) -> tuple[str, int]:
        """Start-up depends only on the decoder, since it decides the imports; "encoded" has no decoder."""
        return self.settings.get("image_decoder", "none (encoded)"), self.processes


class Preprocessing:
    """Runs cases in turns and prints tables of their medians."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self._folder, self._rounds = folder, rounds
        self._tokenizer = tokenizer(folder)
        self.one = Maker(folder / "one", [(folder / "one.jpg").read_bytes()]).llava(1, ".json")

    def settings(self, case: Case) -> dict[str, Any]:
        """All fields of the command's PreprocessConfig."""
        given = {"tokenizer_model": self._tokenizer, "output_prefix": self._folder / "out" / "set"}
        return {**case.given.settings, **given, **case.settings, "workers": case.processes}

    def run_once(self, case: Case) -> CommandCost:
        """Run the command; it is expected to fail if no row can be kept."""
        settings = self.settings(case)
        if case.given.kept:
            return run_preprocess(settings)
        cost = run_command(preprocess_command(settings))
        if "no row of" not in cost.output:
            sys.exit(f"error: {case.name}:\n{cost.output[-3000:]}")
        return cost

    def medians(self, cases: Sequence[Case]) -> list[tuple[float, float]]:
        """(wall seconds, CPU seconds) of each case, medians of the rounds."""
        taken: dict[int, list[CommandCost]] = defaultdict(list)
        for _ in range(self._rounds):
            for number, case in enumerate(cases):
                taken[number].append(self.run_once(case))
        return [
            (
                statistics.median(cost.seconds for cost in taken[number]),
                statistics.median(cost.cpu for cost in taken[number]),
            )
            for number in range(len(cases))
        ]

    def starts(self, cases: Sequence[Case], out: Path | None) -> dict[tuple[str, int], tuple[float, float]]:
        """(wall seconds, CPU seconds) of the start-up, for each decoder and number of processes."""
        table = Table("preprocessing, start", ("decoder", "processes", "s", "CPU s", "imports"), out)
        kinds = {case.start: case for case in cases}
        of_one_row = [Case(case.name, self.one, case.settings, case.processes) for case in kinds.values()]
        found = dict(zip(kinds, self.medians(of_one_row), strict=True))
        for (name, processes), (wall, cpu) in found.items():
            case = kinds[name, processes]
            imports = self._imports(case) if processes == 1 else "the same, in each of them"
            table.add(name, processes, f"{wall:.2f}", f"{cpu:.2f}", imports)
        table.note(
            "A run over one row. `imports`: the packages that take longest, ms of their own modules, as Python's "
            "`-X importtime` says, which itself takes time."
        )
        table.close()
        return found

    def throughput(
        self, title: str, cases: Sequence[Case], starts: dict[tuple[str, int], tuple[float, float]], out: Path | None
    ) -> None:  # fmt: skip
        """Print a table of cases, in pairs with 1 and 2 processes; ratios are relative to the first case."""
        header = (
            "case", "processes", "rows", "s", "CPU s", "rows/s", "MB/s", "rows/s over the first", "CPU ms a row",
            "2 over 1 in CPU-bound time",
        )  # fmt: skip
        table = Table(title, header, out)
        first: float | None = None  # rows/s of the first case; 0 if it was too short to measure
        alone = 0.0  # CPU seconds of one process
        for case, (wall, cpu) in zip(cases, self.medians(cases), strict=True):
            wall, cpu = wall - starts[case.start][0], cpu - starts[case.start][1]
            lost = min(wall, cpu) <= 0
            speed = 0.0 if lost else case.given.rows / wall
            first = speed if first is None else first
            if case.processes == 1:
                alone = 0.0 if lost else cpu
            if lost:
                table.add(case.name, case.processes, f"{case.given.rows:,}", *["too short"] * 7)
                continue
            table.add(
                case.name, case.processes, f"{case.given.rows:,}", f"{wall:.2f}", f"{cpu:.2f}", f"{speed:,.0f}",
                f"{case.given.num_bytes / wall / 1e6:,.1f}", f"{speed / first:.2f}" if first else "",
                f"{1000 * cpu / case.given.rows:.2f}",
                f"{case.processes * alone / cpu:.2f}" if case.processes > 1 and alone else "",
            )  # fmt: skip
        table.note(
            "Without the start-up. `too short`: the case took no longer than that; use a quieter machine or more "
            "--rows. CPU-bound: 2 x the CPU seconds of one process over those of two, the speed-up of two processes if "
            "each has its own core. The decoder `threads` uses all cores even with one process."
        )
        if any(not case.given.kept for case in cases):
            table.note("open_images has no captions: its rows are read, but none is kept.")
        table.close()

    def parent(self, inputs: Sequence[Input], out: Path | None) -> None:
        """Print the CPU time of the parent process per row of each source, with 2 workers."""
        table = Table(
            "preprocessing, CPU of the parent", ("source", "ms a row", "of it source.rows(), ms"), out
        )
        every = [self.settings(Case(given.name, given, {}, 2)) for given in (self.one, *inputs)]
        wanted = {"rounds": self._rounds, "one": every[0], "inputs": every[1:]}
        path = self._folder / "parent.json"
        path.write_text(json.dumps(wanted, default=str))
        script = Path(__file__).with_name("preprocessing_parent.py")
        cost = run_command([sys.executable, str(script), str(path)])
        if cost.status:
            sys.exit(f"error: {script.name}:\n{cost.output[-3000:]}")
        found = json.loads(cost.output.splitlines()[-1])
        start = statistics.median(found["start"])
        for number, given in enumerate(inputs):
            whole, rows = (statistics.median(found[key][number]) for key in ("preprocess", "rows"))
            table.add(
                given.name, f"{1000 * (whole - start) / given.rows:.3f}", f"{1000 * rows / given.rows:.3f}"
            )
        table.note(
            f"`preprocess()` with 2 workers, without its start of {1000 * start:.0f} ms (one row, all being imported)."
        )
        table.close()

    def _imports(self, case: Case) -> str:
        """The five packages with the longest import times."""
        one = Case(case.name, self.one, case.settings, 1)
        command = preprocess_command(self.settings(one))
        cost = run_command([command[0], "-X", "importtime", *command[1:]])
        took: Counter[str] = Counter()
        for microseconds, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", cost.output):
            took[name.split(".")[0]] += int(microseconds)
        return ", ".join(f"{name} {count // 1000}" for name, count in took.most_common(5))


def storage_cases(given: Input) -> list[Case]:
    """Every storage with every installed decoder."""
    decoders = ("threads", "dali") if dali_is_installed() else ("threads",)
    ways: list[tuple[str, dict[str, Any]]] = [("encoded", {})]
    ways += [
        (f"{storage}, {decoder}", {"image_storage": storage, "image_decoder": decoder})
        for storage in ("jpeg", "pixels")
        for decoder in decoders
    ]
    return [Case(name, given, settings, count) for name, settings in ways for count in PROCESSES]


def main() -> None:
    """Measure all cases and print the tables."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5, help="rounds, of which medians are taken")
    options.add_argument("--rows", type=int, default=1152, help="rows of a source with images")
    arguments = options.parse_args()
    rows = 64 if arguments.toy else arguments.rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = all_sources(folder / "sources", rows, rows * TEXT_ROWS)
        size = LARGE if not arguments.toy else (720, 540)
        large = large_photos(folder / "large", max(rows // LARGE_ROWS, 16), *size)
        (folder / "one.jpg").write_bytes((folder / "sources" / "photos" / "0.jpg").read_bytes())
        bench = Preprocessing(folder, arguments.rounds)
        of_sources = [Case(given.name, given, {}, count) for given in inputs for count in PROCESSES]
        of_storage = storage_cases(large)
        starts = bench.starts([*of_sources, *of_storage], arguments.out)
        bench.throughput("preprocessing, sources", of_sources, starts, arguments.out)
        bench.throughput("preprocessing, image storage", of_storage, starts, arguments.out)
        bench.parent(inputs, arguments.out)


if __name__ == "__main__":
    main()
