"""What the quickstart prints, and its picture of the two runs."""

from __future__ import annotations

import shlex
import statistics
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND_WIDTH = 60
MAIN_LOSSES = ("lm_loss", "reconstruction_loss")
"""The first of these that a record has is the run's loss: a decoder's, or a tower's."""
OTHER_LOSSES = {"align_loss": "aligning", "visual_loss": "visual", "contrastive_loss": "contrast"}
"""Losses of some families beside it, with their names in the progress."""

Records = Sequence[dict[str, Any]]
"""Lines of a losses.jsonl, one an iteration."""


def main_loss(record: dict[str, Any]) -> float:
    """The loss of a run that its progress shows first."""
    return float(next(record[name] for name in MAIN_LOSSES if name in record))


class Console:
    """Numbered steps with the time that has passed.

    Args:
        steps: how many there are.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._began = time.monotonic()
        self._step = 0

    @property
    def elapsed(self) -> str:
        """Minutes and seconds since the start."""
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        return f"{minutes}:{seconds:02d}"

    def step(self, title: str, what: str) -> None:
        """Open the next step and say what happens in it."""
        self._step += 1
        print(f"\n[{self._step}/{self._steps}] {self.elapsed}  {title}: {what}", flush=True)

    def say(self, *lines: str) -> None:
        """Lines inside the step."""
        for line in lines:
            print(f"            {line}", flush=True)

    def command(self, words: Sequence[str]) -> None:
        """A command as one could type it, broken before a flag where the line gets long."""
        lines = ["$"]
        for word in words:
            word = shlex.quote(word)
            if word.startswith("--") and len(lines[-1]) > COMMAND_WIDTH:
                lines[-1] += " \\"
                lines.append("   ")
            lines[-1] += f" {word}"
        self.say(*lines)

    def training(self, record: dict[str, Any], iterations: int) -> None:
        """One line of a run's progress."""
        rate = record["tokens"] / record["seconds"]
        others = "".join(
            f"{title} {record[name]:6.4f}   " for name, title in OTHER_LOSSES.items() if name in record
        )
        self.say(
            f"iteration {record['iteration']:4d}/{iterations}   loss {main_loss(record):7.4f}   "
            f"{others}{rate:6,.0f} tokens/s   {self.elapsed}"
        )


@dataclass(frozen=True)
class Outcome:
    """The records of both runs.

    Attributes:
        reference: of the uninterrupted run.
        before: of the other run, up to its kill.
        after: of the other run, from the resume on.
    """

    reference: Records
    before: Records
    after: Records

    @property
    def killed(self) -> int:
        """The last iteration before the kill."""
        return int(self.before[-1]["iteration"])

    @property
    def checkpoint(self) -> int:
        """The iteration that the resumed run started from."""
        return int(self.after[0]["iteration"]) - 1

    def rows(self) -> list[tuple[str, str]]:
        """Rows for the closing table; the losses have been compared before."""
        first, last = self.reference[0], self.reference[-1]
        rate = statistics.median(record["tokens"] / record["seconds"] for record in self.reference)
        samples = sum(record["samples"] for record in self.reference)
        return [
            ("samples", f"{samples:,} in {len(self.reference)} iterations"),
            ("language loss", f"{first['lm_loss']:.4f} at the start, {last['lm_loss']:.4f} at the end"),
            ("aligning loss", f"{first['align_loss']:.4f} at the start, {last['align_loss']:.4f} at the end"),
            ("tokens/s", f"{rate:,.0f} (median of the iterations)"),
            ("killed, resumed", f"after iteration {self.killed}, from {self.checkpoint}"),
            ("losses equal bit for bit", f"yes, all {len(self.reference)}"),
        ]


def table(rows: Sequence[tuple[str, str]]) -> str:
    """A table of two columns."""
    left, right = (max(len(row[column]) for row in rows) for column in (0, 1))
    rule = f"+-{'-' * left}-+-{'-' * right}-+"
    return "\n".join([rule, *(f"| {name:<{left}} | {value:<{right}} |" for name, value in rows), rule])


def plot(outcome: Outcome, captions: Sequence[tuple[Path, str]], path: Path) -> None:
    """Draw the losses of both runs, and photos with the model's captions beside them, into a PNG file.

    Args:
        outcome: the losses.
        captions: a photo and what the model says of it, one below the other.
        path: of the PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    figure = pyplot.figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3), squeeze=False)[0]
    for (photo, caption), axes in zip(
        captions, left.subplots(len(captions), 1, squeeze=False)[:, 0], strict=True
    ):
        with Image.open(photo) as image:
            axes.imshow(image)
        axes.set_axis_off()
        axes.set_title(textwrap.fill(caption, 44), fontsize=9)
    above, below = right.subplots(2, 1, height_ratios=(3, 2), sharex=True)
    for records, label, colour, width in (
        (outcome.reference, "uninterrupted", "#bbbbbb", 6.0),
        (outcome.before, "until the kill", "#c0392b", 1.5),
        (outcome.after, "resumed", "#1f618d", 1.5),
    ):
        iterations = [record["iteration"] for record in records]
        above.plot(iterations, [r["lm_loss"] for r in records], label=label, color=colour, linewidth=width)
        below.plot(iterations, [r["align_loss"] for r in records], color=colour, linewidth=width)
    for axes in (above, below):
        axes.axvline(outcome.killed, color="#c0392b", linestyle=":")
    above.annotate(
        f"SIGKILL after {outcome.killed},\nresumed from {outcome.checkpoint}",
        xy=(outcome.killed, above.get_ylim()[1] / 2),
        xytext=(8, 0),
        textcoords="offset points",
        verticalalignment="top",
        color="#c0392b",
    )
    left.suptitle("captions by the trained model", fontsize=11)
    right.suptitle("pretraining as TP 2 x PP 2, without a GPU", fontsize=11)
    above.set(ylabel="language loss")
    below.set(xlabel="iteration", ylabel="aligning loss")
    above.legend(loc="upper right")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
