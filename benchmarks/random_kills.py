"""Kills a run a hundred times at random moments and checks that it resumes with the same losses.

    python benchmarks/random_kills.py --kills 100 --seed 0

`eve_mini` on two data-parallel gloo ranks, a checkpoint every three steps with `--async-save --keep-last 2`. Each start
ends with SIGKILL: to one rank, after which torchrun ends the other; to torchrun and both ranks, which leaves writer
processes without a parent; or to all processes. The moment is random: during start-up, after some steps, while a
checkpoint is written, or just after a checkpoint folder is renamed. After every kill no process of the run may be
alive, every checkpoint folder must match its checksums, and the tracker must not name an older iteration than before.
Every start that runs long enough must resume from the checkpoint that the tracker names, must not fall back to an older
one, and must remove partial folders. At the end, the losses of all iterations, repeated ones included, must be equal
bit for bit to those of an uninterrupted run.

The seed decides which processes are killed and at which kind of moment; the iteration reached by then depends on the
machine. The exit status is 0 only if all checks passed; otherwise the folder of the run is kept for inspection.
"""

from __future__ import annotations

import itertools
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_eve.checkpoint.files import damaged_part, missing_part
from megatron_eve.checkpoint.store import CheckpointStore
from megatron_eve.runtime.command_line import command_parser_of
from tests.training.killed_runs import Run, Runs, lines_of, resumes_at

RANKS = 2
FLAGS = ("--async-save", "--keep-last", "2")
ITERATIONS = 100  # per kill: more than a run can reach in time
VICTIMS = ("a rank", "torchrun and ranks", "everything")
KINDS = {
    "starting": 2,
    "some steps on": 3,
    "while writing": 4,
    "while naming": 2,
}  # relative frequencies
FIRST_START = 8.0  # assumed seconds from a start to its first step, until one is measured
WRITING = 1.0  # kills come within these seconds after a folder appears, about the time of writing it
TIMEOUT = 300.0  # seconds for a start to reach its kill condition, and for torchrun to end


@dataclass
class KilledStart:
    """One start of the run and the kill that ended it.

    Attributes:
        kind, victim: moment and processes of the kill.
        before, after: the iteration in the tracker at the start and after the kill.
        resumed: the iteration that the start printed as its first; None if it was killed before that.
        reached: the last iteration that the run has reported so far.
        partial: whether the kill left a partial folder.
        unnamed: whether it left a complete folder that the tracker does not name yet.
        ending: seconds from the kill until torchrun had ended.
        wrong: checks that failed.
    """

    kind: str
    victim: str
    before: int
    after: int = 0
    resumed: int | None = None
    reached: int = 0
    partial: bool = False
    unnamed: bool = False
    ending: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        resumed = "not resumed yet" if self.resumed is None else f"resumed from {self.resumed}"
        left = ["a partial folder left"] * self.partial + ["a complete folder unnamed"] * self.unnamed
        facts = [
            f"started with tracker {self.before}, {resumed}",
            f"killed {self.kind}: {self.victim}",
            f"at iteration {self.reached}, tracker {self.after}",
            f"all ended in {self.ending:.1f} s",
            *left,
            *(f"FAILED: {problem}" for problem in self.wrong),
        ]
        return "; ".join(facts)


class Killer:
    """Starts and kills a run repeatedly.

    Args:
        folder: for data, checkpoints and logs.
        kills: number of kills.
        seed: for the random choices.
    """

    def __init__(self, folder: Path, kills: int, seed: int) -> None:
        self.runs = Runs(folder, ITERATIONS * kills, *FLAGS)
        self.save = folder / "killed"
        self._seed = seed
        self._starting = FIRST_START

    def start_and_kill(self, number: int) -> KilledStart:
        """Start the run once and kill it."""
        draw = random.Random(f"{self._seed}:{number}")
        kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
        start = KilledStart(kind, draw.choice(VICTIMS), resumes_at(self.save))
        known, leftovers = len(lines_of(self.save)), self._leftovers()
        run = self.runs.start(self.save, RANKS)
        try:
            if self._wait(run, self._kill_condition(kind, known, draw)):
                self._kill(run, start, draw.randrange(RANKS))
            else:
                start.wrong.append(f"did not reach its kill condition; it printed\n{run.output()[-3000:]}")
        finally:
            run.kill()
        self._check_start(run, start, known, leftovers)
        self._check_folder(start, leftovers)
        return start

    def _kill_condition(self, kind: str, known: int, draw: random.Random) -> Callable[[], bool]:
        """A function that tells when to kill; `known` lines of losses.jsonl are from earlier starts."""
        began, there = time.monotonic(), self._folders()

        def waited(seconds: float, since: float) -> bool:
            return time.monotonic() - since >= seconds

        if kind == "starting":
            seconds = draw.uniform(0.0, self._starting)
            return lambda: waited(seconds, began)
        if kind == "some steps on":
            wanted, delay = draw.randint(1, 8), draw.uniform(0.0, 0.3)

            def count() -> int:
                lines = self._count_lines() - known
                if lines == 1:
                    self._starting = time.monotonic() - began
                return lines
        else:
            wanted, delay = draw.randint(1, 3), draw.uniform(0.0, WRITING) * (kind == "while writing")
            pattern = r"iter_\d+\.partial\..*" if kind == "while writing" else r"iter_\d+"
            seen: set[str] = set()

            def count() -> int:
                seen.update(name for name in self._folders() - there if re.fullmatch(pattern, name))
                return len(seen)

        reached: list[float] = []

        def reached_moment() -> bool:
            if not reached and count() >= wanted:
                reached.append(time.monotonic())
            return bool(reached) and waited(delay, reached[0])

        return reached_moment

    def _wait(self, run: Run, reached_moment: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + TIMEOUT
        while not reached_moment():
            if run.torchrun.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return run.torchrun.poll() is None

    def _kill(self, run: Run, start: KilledStart, rank: int) -> None:
        """Kill the chosen processes and wait until the others have ended. Before ranks exist, torchrun is killed."""
        began = time.monotonic()
        ranks = run.ranks() if start.victim == "a rank" else []
        if start.victim == "everything":
            run.kill()
        elif len(ranks) == RANKS:
            start.victim = f"rank {rank}"
            ranks[rank].kill()
        else:
            start.victim = "torchrun and ranks"
            run.torchrun.kill()
            run.torchrun.wait()
            for process in run.ranks():
                process.kill()
        try:
            run.torchrun.wait(TIMEOUT)
        except psutil.TimeoutExpired:
            start.wrong.append(f"torchrun did not end within {TIMEOUT:.0f} s")
        start.ending = time.monotonic() - began
        alive = run.outlives(20)
        if alive:
            start.wrong.append(f"outlived the run: {alive}")

    def _check_start(self, run: Run, start: KilledStart, known: int, leftovers: set[str]) -> None:
        """Check the output and the files of a start; see the docstring of this file."""
        output, lines = run.output(), lines_of(self.save)
        found = re.search(r"starting at iteration (\d+)", output)
        start.resumed = int(found[1]) if found else None
        if start.resumed not in (None, start.before):
            start.wrong.append(f"resumed from {start.resumed}, the tracker named {start.before}")
        if "going back to iteration" in output or "no checkpoint there is whole" in output:
            start.wrong.append("reported a checkpoint as damaged")
        done = [line["iteration"] for line in lines[known:]]
        if done != list(range(start.before + 1, start.before + 1 + len(done))):
            start.wrong.append(f"reported iterations {done}")
        if done and leftovers & self._folders():
            start.wrong.append(f"did not remove {sorted(leftovers & self._folders())}")
        start.reached = max((line["iteration"] for line in lines), default=0)

    def _check_folder(self, start: KilledStart, leftovers: set[str]) -> None:
        """Check the checkpoint folders after a kill; `leftovers` are partial folders of earlier kills."""
        store = CheckpointStore(self.save)
        start.after = resumes_at(self.save)
        if start.after < start.before:
            start.wrong.append("the tracker went back")
        whole = store.iterations()
        if start.after and start.after not in whole:
            start.wrong.append("the tracker names a checkpoint that is not there")
        for iteration in whole:
            folder = store.folder(iteration)
            problem = missing_part(folder, optimizer=True) or damaged_part(folder, 0, 1)
            if problem:
                start.wrong.append(f"{folder.name}: {problem}")
        start.partial = any(".partial." in name for name in self._folders() - leftovers)
        start.unnamed = any(iteration > start.after for iteration in whole)

    def _count_lines(self) -> int:
        path = self.save / "losses.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def _folders(self) -> set[str]:
        return {path.name for path in self.save.glob("iter_*")} if self.save.exists() else set()

    def _leftovers(self) -> set[str]:
        return {name for name in self._folders() if not re.fullmatch(r"iter_\d+", name)}

    def last_start(self) -> KilledStart:
        """Start once more and stop it with SIGTERM after it has written a checkpoint."""
        start = KilledStart("not", "nobody", resumes_at(self.save))
        known, leftovers = len(lines_of(self.save)), self._leftovers()
        run = self.runs.start(self.save, RANKS)
        try:
            if not self._wait(run, lambda: resumes_at(self.save) > start.before):
                start.wrong.append(f"wrote no checkpoint; it printed\n{run.output()[-3000:]}")
            for rank in run.ranks():
                rank.send_signal(signal.SIGTERM)
            if run.torchrun.wait(TIMEOUT) != 0:
                start.wrong.append(f"did not stop on SIGTERM; it printed\n{run.output()[-3000:]}")
        finally:
            run.kill()
        self._check_start(run, start, known, leftovers)
        self._check_folder(start, set())
        if start.resumed is None or start.after != start.reached or start.partial:
            start.wrong.append("the last start did not end with a complete checkpoint")
        return start


def differing(killer: Killer, whole: Path) -> list[str]:
    """Run without kills up to the last iteration of the killed run; returns the differences."""
    lines = lines_of(killer.save)
    last = lines[-1]["iteration"]
    run = killer.runs.start(whole, RANKS, "--save-interval", str(last), "--exit-interval", str(last))
    try:
        if run.torchrun.wait() != 0:
            return [f"the uninterrupted run failed:\n{run.output()[-3000:]}"]
    finally:
        run.kill()
    expected = {line["iteration"]: line for line in lines_of(whole)}
    names = ("lm_loss_hex", "sample_ids_sha256", "consumed_samples", "lr", "grad_norm")
    wrong = [
        f"iteration {line['iteration']}: {name} is {line[name]}, {expected[line['iteration']][name]} without kills"
        for line, name in itertools.product(lines, names)
        if line[name] != expected[line["iteration"]][name]
    ]
    missing = set(range(1, last + 1)) - {line["iteration"] for line in lines}
    return wrong + [f"iterations {sorted(missing)} are missing"] * bool(missing)


def show(starts: list[KilledStart], reached: int, lines: int) -> None:
    """Print tables of the kills, the iterations reached and the lines of losses.jsonl."""
    victims = ("rank 0", "rank 1", "torchrun and ranks", "everything")
    counts = Counter((start.kind, start.victim) for start in starts)
    print(
        "| killed | " + " | ".join(victims) + " | all | left a partial folder | left a complete one unnamed |"
    )
    print("|---" * (len(victims) + 4) + "|")
    for kind in KINDS:
        these = [start for start in starts if start.kind == kind]
        row = [*(counts[kind, victim] for victim in victims), len(these)]
        row += [sum(start.partial for start in these), sum(start.unnamed for start in these)]
        print(f"| {kind} | " + " | ".join(str(number) for number in row) + " |")
    endings = [start.ending for start in starts if start.victim.startswith("rank")]
    slow = sum(seconds > 5 for seconds in endings)
    print(
        f"\n{len(starts)} kills; {sum(start.resumed is not None for start in starts)} starts printed where they "
        "resumed, the others were killed before; "
        f"{sum(start.after > start.before for start in starts)} starts wrote a checkpoint; "
        f"{reached} iterations were reached, {lines - reached} were done again"
    )
    if endings:
        print(
            f"torchrun ended the other rank in {statistics.median(endings):.1f} s (median; longest "
            f"{max(endings):.1f} s, {slow} of {len(endings)} took more than 5 s)"
        )


def main() -> int:
    """Run all kills, compare the losses and print the results.

    Returns:
        The exit status.
    """
    parser = command_parser_of(__doc__)
    parser.add_argument("--kills", type=int, default=100, help="times that the run is killed")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the moments and of the processes that are killed"
    )
    arguments = parser.parse_args()
    folder, began = Path(tempfile.mkdtemp(prefix="random_kills_")), time.monotonic()
    killer, starts = Killer(folder, arguments.kills, arguments.seed), []
    for number in range(1, arguments.kills + 1):
        starts.append(killer.start_and_kill(number))
        print(f"{number}/{arguments.kills} ({time.monotonic() - began:.0f} s): {starts[-1]}", flush=True)
    starts.append(killer.last_start())
    print(f"last start: {starts[-1]}", flush=True)
    wrong = [problem for start in starts for problem in start.wrong]
    differences = differing(killer, folder / "whole")
    print("\n".join([*differences, ""]))
    show(starts[:-1], starts[-1].reached, len(lines_of(killer.save)))
    print(
        f"{len(wrong)} checks failed, {len(differences)} differences; {time.monotonic() - began:.0f} s in all"
    )
    if wrong or differences:
        print(f"see {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
