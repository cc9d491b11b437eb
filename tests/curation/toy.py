"""The three toy downloads of `examples/curation_tiny`, prepared, with a tiny tower and a tiny captioner: all that the
stages of a curation read.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_eve.config import PRESETS
from tests.inference.baseline_models import make_llava
from tools.prepare_data import main as prepare_data

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
sys.path += [str(EXAMPLES), str(EXAMPLES / "quickstart")]

from curation_tiny.downloads import SOURCES, Row, make_rows, write_downloads  # noqa: E402
from toy_teacher import save_toy_teacher  # noqa: E402

PROMPT = "Describe the picture."
ANY_CAPTION = ("--min-words", "0", "--max-words", "1000", "--max-repeated", "1", "--no-complete-sentences")
"""Flags of the stage caption with which all captions are kept: those of random weights are no sentences."""


@dataclass(frozen=True)
class Toy:
    """Shards, a tower and a captioner in one folder.

    Attributes:
        folder: prepared/ has the shards, a folder for each download.
        rows: of the downloads.
    """

    folder: Path
    rows: list[Row]

    @property
    def inputs(self) -> list[str]:
        """Patterns of the shards, in the order of the downloads."""
        return [f"{self.folder}/prepared/{source}/*.parquet" for source in SOURCES]

    def stages(self, captions: Sequence[str] = ()) -> list[list[str]]:
        """All stages, each with its flags.

        Args:
            captions: flags of the stage caption that say who writes them; by default the random captioner.
        """
        random = ("--model-path", f"{self.folder}/captioner", "--max-new-tokens", "6", *ANY_CAPTION)
        return [
            [
                "filter",
                "--input",
                *self.inputs,
                "--min-side",
                "200",
                "--min-words",
                "3",
                "--max-repeated",
                "0.3",
            ],
            ["duplicates"],
            ["features", "--tower", f"{self.folder}/tower"],
            ["centres", "--centres", "12", "--points-per-centre", "4"],
            ["assign"],
            ["select", "--per-cluster", "3"],
            ["caption", "--prompt-file", f"{self.folder}/prompts.txt", *(captions or random)],
            ["build"],
        ]

    def lines(self) -> list[str]:
        """The same as lines of a file of stages."""
        return [shlex.join(words) for words in self.stages()]


def make_toy(folder: Path, views: int, rows_per_shard: int) -> Toy:
    """Write the downloads and prepare them.

    Args:
        folder: is made.
        views: of each of 20 photos in each download.
        rows_per_shard: of the prepared shards.
    """
    rows = make_rows(views)
    write_downloads(rows, folder / "downloads")
    for source in SOURCES:
        words = [
            source,
            "--source",
            f"{folder}/downloads/{source}",
            "--output",
            f"{folder}/prepared/{source}",
        ]
        words += ["--rows-per-shard", str(rows_per_shard), "--workers", "1"]
        assert prepare_data([*words, "--drop-license", "*by-nc*"]) == 0
    save_toy_teacher(folder / "tower", PRESETS["eve_tiny"].vision)
    make_llava(folder / "captioner")
    (folder / "prompts.txt").write_text(f"{PROMPT}\n")
    return Toy(folder, rows)
