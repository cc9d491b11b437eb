"""How long training stands still for a checkpoint: written while it waits, and with `--async-save`.

    python benchmarks/checkpoint_pause.py [--saves 4] [--layers 8] [--folder FOLDER]

Two data-parallel gloo ranks with the distributed optimizer train a decoder of width 1024 on mock data in float32, one
thread a rank, and save every few steps; first in the foreground, then in the background. What is printed comes from the
run's own log: how long training stood still for each checkpoint, the time of each step, and when its lines appeared. A
checkpoint counts as being written from the log line of its step to the line that says it is saved. The run is ended by
force after so many saves, so that the save at the end of a run, which is waited for, is not among them.

Takes 16 bytes a parameter and checkpoint in FOLDER (a temporary one), two of which are there at a time.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.training.killed_runs import Run

WORDS = (
    "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megatron_eve.pretrain", "--mock-data",
    "--hidden-size", "1024", "--ffn-hidden-size", "2752", "--num-attention-heads", "16", "--vocab-size", "8000",
    "--global-batch-size", "2", "--seq-length", "256", "--train-iters", "100000", "--keep-last", "1",
)  # fmt: skip
_SLACK = 0.2  # seconds between what happens and when its line is read
_STEP = re.compile(r" iteration +(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+)")
_SAVED = re.compile(r"saved checkpoint at iteration (\d+) .*\(training stood still for ([\d.]+) s\)")


@dataclass
class Timing:
    """What a run's log says.

    Attributes:
        parameters: of the model.
        size: bytes of a checkpoint.
        steps: seconds of each iteration.
        ended: when each iteration's line appeared.
        paused: seconds for which training stood still, by the checkpoint's iteration.
        published: when each checkpoint's line appeared.
    """

    parameters: int = 0
    size: int = 0
    steps: dict[int, float] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)
    paused: dict[int, float] = field(default_factory=dict)
    published: dict[int, float] = field(default_factory=dict)

    def read(self, line: str, now: float) -> None:
        """Take up one line of the log."""
        if found := _STEP.match(line):
            self.steps[int(found[1])], self.ended[int(found[1])] = float(found[2]) / 1000, now
        elif found := _SAVED.match(line):
            self.paused[int(found[1])], self.published[int(found[1])] = float(found[2]), now
        elif found := re.search(r"([\d,]+) parameters over", line):
            self.parameters = int(found[1].replace(",", ""))

    @property
    def writing(self) -> list[float]:
        """Seconds from the end of a step to its checkpoint's being there."""
        return [self.published[iteration] - self.ended[iteration] for iteration in self.paused]

    def step_seconds(self, while_writing: bool) -> list[float]:
        """Seconds of the steps that ran while a checkpoint was being written, or of the others but the first."""
        found = []
        for iteration, seconds in self.steps.items():
            began = self.ended[iteration] - seconds
            busy = any(self.ended[i] - _SLACK < began < self.published[i] - _SLACK for i in self.paused)
            # A step after the last checkpoint that is known may share its time with one that is not.
            if iteration > 1 and busy == while_writing and iteration <= max(self.paused):
                found.append(seconds)
        return found


def measure(folder: Path, layers: int, saves: int, interval: int, background: bool) -> Timing:
    """Train until so many checkpoints have been written.

    Raises:
        RuntimeError: the run ended before; the message is the end of its log.
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
        # `--keep-last 1` removes it only when the next one is there.
        files = (save / f"iter_{max(timing.paused):07d}").iterdir()
        timing.size = sum(path.stat().st_size for path in files)
    finally:
        run.kill()
    shutil.rmtree(save)
    return timing


def row(name: str, timing: Timing) -> tuple[str, ...]:
    """A row of the table."""
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
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--saves", type=int, default=4, help="checkpoints of each kind")
    parser.add_argument("--layers", type=int, default=8, help="of the decoder, 12.6 M parameters each")
    parser.add_argument("--interval", type=int, default=6, help="steps from one checkpoint to the next")
    parser.add_argument("--folder", type=Path, help="where to write; its disk is what is measured")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="checkpoint_pause_") as folder:
        found = {
            name: measure(Path(folder), arguments.layers, arguments.saves, arguments.interval, background)
            for name, background in (("in the foreground", False), ("`--async-save`", True))
        }
    header = (
        "checkpoint",
        "bytes",
        "stood still, median",
        "each, s",
        "until it was there, median",
        "a step, median",
        "a step while writing, median",
    )
    print(f"{next(iter(found.values())).parameters:,} parameters, two ranks\n")
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for name, timing in found.items():
        print("| " + " | ".join(row(name, timing)) + " |")


if __name__ == "__main__":
    main()
