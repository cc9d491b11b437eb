"""Datasets and runs of one process for an experiment, each a command of this repository."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folder import NotOurs, prepare
from launch import ROOT, Command, StepFailed, follow, read_records, shown, words
from report import Console

from megatron_eve.config.presets import PRESETS
from megatron_eve.runtime.command_line import command_parser_of

PRESET = "vila_tiny"


@dataclass(frozen=True)
class Runs:
    """The folder of an experiment: datasets in `data/`, a folder for each run, logs.

    Attributes:
        output: the folder.
        console: gets the progress.
    """

    output: Path
    console: Console

    @property
    def data(self) -> Path:
        """Folder of the datasets and of what they are made of."""
        return self.output / "data"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of all datasets."""
        return self.data / "tokenizer.model"

    def folder(self, run: str) -> Path:
        """Folder of a run."""
        return self.output / "runs" / run

    def preprocess(self, name: str, rows: Path, template: str, *flags: object) -> None:
        """Make the dataset `data/NAME` of rows; `flags` are further ones of the preprocessing."""
        vision = PRESETS[PRESET].vision
        arguments = words(
            "--family", "vila", "--input", rows, "--image-root",
            self.data / "images", "--tokenizer-model", self.tokenizer, "--output-prefix", self.data / name,
            "--template", template, "--image-size", vision.image_size, "--vision-patch-size",
            vision.vision_patch_size, *flags,
        )  # fmt: skip
        command = [sys.executable, "tools/preprocess_data.py", *arguments]
        with Command(command, self.output / "logs" / f"preprocess-{name}.log") as running:
            running.wait()

    def train(
        self,
        name: str,
        blend: Sequence[object],
        *flags: object,
        start: str | None = None,
        show: bool = False,
    ) -> list[dict[str, Any]]:
        """Train on one process, and save once, at the end.

        Args:
            name: of the run, so of its folder.
            blend: datasets by name, or weights and names in turns.
            flags: of `megatron_eve.pretrain`.
            start: the run whose weights this one starts from.
            show: show the command.

        Returns:
            The lines of its losses.jsonl.
        """
        folder = self.folder(name)
        data = [self.data / word if isinstance(word, str) else word for word in blend]
        weights = () if start is None else ("--pretrained-checkpoint", self.folder(start))
        arguments = words(
            "--preset", PRESET, "--data-path", *data, "--tokenizer-model", self.tokenizer, "--save", folder, *weights,
            *flags,
        )  # fmt: skip
        if show:
            self.console.command(
                [shown(word) for word in ["python", "-m", "megatron_eve.pretrain", *arguments]]
            )
        command = [sys.executable, "-m", "megatron_eve.pretrain", *arguments]
        with Command(command, self.output / "logs" / f"{name}.log") as running:
            for _ in follow(running, folder / "losses.jsonl"):
                pass
            running.wait()
        records = read_records(folder / "losses.jsonl")
        self.console.say(
            f"{name}: {len(records)} iterations, loss {records[0]['lm_loss']:.4f} -> {records[-1]['lm_loss']:.4f}   "
            f"{self.console.elapsed}"
        )
        return records

    def ask(
        self, name: str, questions: Sequence[tuple[str, Sequence[str], str]], *flags: object
    ) -> dict[str, str]:
        """Put questions to the model of a run, one process for all of them; answers are greedy.

        Args:
            name: of the run.
            questions: for each an id, file names of pictures in `data/images`, and the text.
            flags: of `tools/generate.py`.

        Returns:
            The answers by id.
        """
        asked, answers = self.output / "questions.jsonl", self.output / "answers.jsonl"
        lines = [{"question_id": key, "image": [*images], "text": text} for key, images, text in questions]
        asked.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        answers.unlink(missing_ok=True)  # those of another model
        arguments = words(
            "--model-path", self.folder(name), "--tokenizer-model", self.tokenizer, "--question-file", asked,
            "--image-folder", self.data / "images", "--answers-file", answers, *flags,
        )  # fmt: skip
        with Command(
            [sys.executable, "tools/generate.py", *arguments], self.output / "logs" / "answers.log"
        ) as running:
            running.wait()
        return {row["question_id"]: row["text"] for row in read_records(answers)}

    def held_out(self, name: str) -> list[dict[str, Any]]:
        """The evaluations of a run: lines with `iteration`, `dataset` and `lm_loss`."""
        return read_records(self.folder(name) / "valid_losses.jsonl")


def experiment_parser(description: str | None, folder: str) -> argparse.ArgumentParser:
    """A command line with the flag --output, by default `folder` in the repository."""
    parser = command_parser_of(description)
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / folder,
        metavar="DIR",
        help=f"folder for all that is made (default: {folder})",
    )
    return parser


def run_experiment(output: Path, steps: int, experiment: Callable[[Runs], None]) -> int:
    """Prepare a folder and run an experiment of so many steps in it; returns the exit status."""
    try:
        prepare(output)
    except NotOurs as found:
        print(f"error: {found}: move it away, or choose another folder with --output", file=sys.stderr)
        return 2
    try:
        experiment(Runs(output, Console(steps)))
    except StepFailed as failure:
        print(f"\nthe experiment failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped, and with it all that was started", file=sys.stderr)
        return 130
    return 0
