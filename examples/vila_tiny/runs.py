"""Datasets and runs of one process for an experiment, each a command of this repository."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import Command, follow, read_records, shown, words
from report import Console

from megatron_eve.config.presets import PRESETS

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

    def preprocess(self, name: str, rows: Path, template: str) -> None:
        """Make the dataset `data/NAME` of rows."""
        vision = PRESETS[PRESET].vision
        arguments = words(
            "--family", "vila", "--input", rows, "--image-root",
            self.data / "images", "--tokenizer-model", self.tokenizer, "--output-prefix", self.data / name,
            "--template", template, "--image-size", vision.image_size, "--vision-patch-size",
            vision.vision_patch_size,
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

    def held_out(self, name: str) -> list[dict[str, Any]]:
        """The evaluations of a run: lines with `iteration`, `dataset` and `lm_loss`."""
        return read_records(self.folder(name) / "valid_losses.jsonl")
