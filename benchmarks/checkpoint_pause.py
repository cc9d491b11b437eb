"""How long training pauses for a checkpoint, without and with `--async-save`.

    python benchmarks/checkpoint_pause.py --saves 4 --layers 8

Two data-parallel gloo ranks with the distributed optimizer train a decoder of width 1024 on mock data in float32, one
thread a rank, and save every few steps; first in the foreground, then in the background. The printed figures
come from the log of the run: the pause for each checkpoint, the time of each step, and the time at which log lines
appeared. A checkpoint counts as being written from the log line of its step to the line that reports it as saved. The
run is killed after `--saves` checkpoints, so the final save of a run, which is always synchronous, is not measured.

Needs 16 bytes per parameter and checkpoint in FOLDER (default: a temporary one), for two checkpoints at a time.
"""

from __future__ import annotations

import re
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_eve.runtime.command_line import command_parser_of
from tests.training.killed_runs import Run

WORDS = (
    "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megatron_eve.pretrain", "--mock-data",
    "--hidden-size", "1024", "--ffn-hidden-size", "2752", "--num-attention-heads", "16", "--vocab-size", "8000",
    "--global-batch-size", "2", "--seq-length", "256", "--train-iters", "100000", "--keep-last", "1",
)  # fmt: skip
_SLACK = 0.2  # seconds between an event and the reading of its log line
_STEP = re.compile(r" iteration +(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+)")
_SAVED = re.compile(r"saved checkpoint at iteration (\d+) .*\(training stood still for ([\d.]+) s\)")


@dataclass
class Timing:
    """Figures from the log of a run.

    Attributes:
        parameters: of the model.
        size: bytes of a checkpoint.
        steps: seconds of each iteration.
        ended: time at which the log line of each iteration appeared.
        paused: seconds that training paused, by iteration of the checkpoint.
        published: time at which the log line of each checkpoint appeared.
    """

    parameters: int = 0
    size: int = 0
    steps: dict[int, float] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)
    paused: dict[int, float] = field(default_factory=dict)
    published: dict[int, float] = field(default_factory=dict)

    def read(self, line: str, now: float) -> None:
        """Parse one line of the log."""
        if found := _STEP.match(line):
            self.steps[int(found[1])], self.ended[int(found[1])] = float(found[2]) / 1000, now
        elif found := _SAVED.match(line):
            self.paused[int(found[1])], self.published[int(found[1])] = float(found[2]), now
        elif found := re.search(r"([\d,]+) parameters over", line):
            self.parameters = int(found[1].replace(",", ""))

    @property
    def writing(self) -> list[float]:
        """Seconds from the end of each step to the completion of its checkpoint."""
        return [self.published[iteration] - self.ended[iteration] for iteration in self.paused]

    def step_seconds(self, while_writing: bool) -> list[float]:
        """Seconds of the steps during which a checkpoint was being written, or of all others except the first."""
        found = []
        for iteration, seconds in self.steps.items():
            began = self.ended[iteration] - seconds
            busy = any(self.ended[i] - _SLACK < began < self.published[i] - _SLACK for i in self.paused)
            # Steps after the last known checkpoint are left out: another checkpoint may be in progress.
            if iteration > 1 and busy == while_writing and iteration <= max(self.paused):
                found.append(seconds)
        return found


def measure(folder: Path, layers: int, saves: int, interval: int, background: bool) -> Timing:
    """Train until `saves` checkpoints have been written.

    Raises:
        RuntimeError: the run ended before that; the message is the end of its log.
    """
    save, timing, read = folder / ("background" if background else "foreground"), Timing(), 0
    words = [*WORDS, "--num-layers", str(layers), "--save-interval", str(interval), "--save", str(save)]
    run = Run([sys.executable, *words, *["--async-save"] * background], save, str(save))
    try:
        while len(timing.paused) < saves:
            if run.torchrun.poll() is not None:
                raise RuntimeError(run.output()[-3000:])
            lines, now = run.output().split("\n")[:-1], time.monotonic()
            for line in lines[read:]:
                timing.read(line, now)
            read = len(lines)
            time.sleep(0.02)
        # `--keep-last 1` removes it only after the next one is complete.
        files = (save / f"iter_{max(timing.paused):07d}").iterdir()
        timing.size = sum(path.stat().st_size for path in files)
    finally:
        run.kill()
    shutil.rmtree(save)
    return timing


def row(name: str, timing: Timing) -> tuple[str, ...]:
    """Format a row of the table."""
    busy = timing.step_seconds(while_writing=True)
    pauses = list(timing.paused.values())
    return (
        name,
        f"{timing.size / 1e9:.2f} GB",
        f"{statistics.median(pauses):.2f} s",
        ", ".join(f"{seconds:.2f}" for seconds in pauses),
        f"{statistics.median(timing.writing):.2f} s",
        f"{statistics.median(timing.step_seconds(while_writing=False)):.2f} s",
        f"{statistics.median(busy):.2f} s ({len(busy)} steps)" if busy else "-",
    )


def main() -> None:
    """Measure both modes and print the table."""
    parser = command_parser_of(__doc__)
    parser.add_argument("--saves", type=int, default=4, help="checkpoints of each kind")
    parser.add_argument("--layers", type=int, default=8, help="of the decoder, 12.6 M parameters each")
    parser.add_argument("--interval", type=int, default=6, help="steps from one checkpoint to the next")
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="folder on the disk to be measured (default: a temporary one)",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="checkpoint_pause_") as folder:
        found = {
            name: measure(Path(folder), arguments.layers, arguments.saves, arguments.interval, background)
            for name, background in (("in the foreground", False), ("`--async-save`", True))
        }
    header = (
        "checkpoint",
        "bytes",
        "pause, median",
        "each, s",
        "until complete, median",
        "a step, median",
        "a step while writing, median",
    )
    print(f"{next(iter(found.values())).parameters:,} parameters, two ranks\n")
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for name, timing in found.items():
        print("| " + " | ".join(row(name, timing)) + " |")


if __name__ == "__main__":
    main()
