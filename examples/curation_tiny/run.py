"""Curation at toy size: from three downloads in their published layouts to a dataset of chosen pictures.

SA-1B, OpenImages and LAION are views of 20 photos here, among them rows that have to be dropped: too small, padded,
with poor captions, copies of others. The stages are those of a curation of millions of rows: rules, duplicates over all
downloads, features of a vision tower, clusters, the pictures nearest to each centre, captions by a vision-language
model, which is killed with SIGKILL and goes on, and curated shards, which become a dataset. Each bad row must have been
dropped for its reason, and each row of the dataset must have its own picture and metadata.

    python examples/curation_tiny/run.py
    make curation
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]  # which has what the examples need alike

from installed import installed_by  # noqa: E402

with installed_by("make curation", "datatrove", "faiss", "imagehash", extras="quickstart,curate"):
    import photos
    import tokenizer
    from curation_tiny.captioner import PROMPT, train_captioner
    from curation_tiny.checks import check_dataset, check_fates, found_fates
    from curation_tiny.downloads import FAILED, GOOD, SOURCES, UNWANTED, Row, make_rows, write_downloads
    from curation_tiny.views import KINDS
    from launch import Command, StepFailed, shown, words
    from report import Console, table
    from runs import Runs, example_parser, run_example
    from toy_teacher import save_toy_teacher

    from megatron_eve.config import PRESETS
    from megatron_eve.curation.work import Work

STEPS = 7
PER_CLUSTER = 4
ROWS_PER_SHARD = 60
LEAST_RIGHT = 0.5
"""Share of the captions that must be the sentence of the photo; a guess is right one time in 20."""
_VISION = PRESETS["eve_tiny"].vision


@dataclass(frozen=True)
class Example:
    """The steps, each of which raises `StepFailed` where something is not as it must be.

    Attributes:
        runs: the folder that the example owns.
    """

    runs: Runs

    def run(self) -> None:
        """All steps, and the table."""
        runs, step = self.runs, self.runs.console.step
        rows = self._make_downloads()
        step("Filter and duplicates", "rules for pictures and captions, then copies over all downloads")
        patterns = [f"{runs.output}/prepared/{source}/*.parquet" for source in SOURCES]
        self._curate(
            "filter", "--input", *patterns, "--min-side", 200, "--min-words", 3, "--max-repeated", 0.3
        )
        self._curate("duplicates")
        fates = check_fates(rows, found_fates(runs.output / "prepared", Work.open(self._work)))
        runs.console.say(
            f"all {len(rows) - fates[GOOD]} bad rows were dropped for their reasons, and no other row"
        )
        step(
            "Clusters", f"features of a tower with random weights, {len(KINDS)} centres, the nearest of each"
        )
        from transformers.utils.logging import disable_progress_bar  # here: transformers takes long to import

        disable_progress_bar()
        tower = save_toy_teacher(runs.output / "tower", _VISION)
        self._curate("features", "--tower", tower)
        self._curate("centres", "--centres", len(KINDS), "--points-per-centre", 8)
        self._curate("assign")
        self._curate("select", "--per-cluster", PER_CLUSTER)
        killed = self._write_captions()
        step("Dataset", "curated shards, then the dataset that training reads")
        self._curate("build")
        rows_left, right = self._make_dataset(rows)
        print("\n" + table(self._summary(rows, fates, killed, rows_left, right)))
        print(
            f"What the commands printed is in {shown(runs.output / 'logs')}. The real thing: docs/curation.md"
        )
        if right < LEAST_RIGHT * rows_left:
            raise StepFailed(f"only {right} of {rows_left} captions say what the picture shows")

    @property
    def _work(self) -> Path:
        return self.runs.output / "work"

    def _curate(self, stage: str, *flags: object) -> None:
        """Run a stage, and show its summary."""
        printed = self.runs.tool("tools/curate.py", stage, stage, "--work", self._work, *flags)
        lines = [line for line in printed.splitlines() if not line.startswith((f"{stage}: ", "["))]
        self.runs.console.say(*lines)

    def _make_downloads(self) -> list[Row]:
        """Steps 1 and 2; returns the rows of the downloads."""
        runs, console = self.runs, self.runs.console
        console.step(
            "Downloads", f"views of {len(KINDS)} photos in the layouts of SA-1B, OpenImages and LAION"
        )
        rows = make_rows()
        write_downloads(rows, runs.output / "downloads")
        console.say(f"-> {shown(runs.output / 'downloads')}: {len(rows)} rows")
        console.step("Preparing", "each download to parquet shards, with pictures, licenses and URLs inside")
        for source in SOURCES:
            runs.tool(
                "tools/prepare_data.py", f"prepare-{source}", source, "--source", runs.output / "downloads" / source,
                "--output", runs.output / "prepared" / source, "--rows-per-shard", ROWS_PER_SHARD,
                "--drop-license", "*by-nc*",
            )  # fmt: skip
        return rows

    def _write_captions(self) -> int:
        """Train the captioner, and write captions with a kill; returns the number of shards that the kill left."""
        runs, console = self.runs, self.runs.console
        console.step("Captioner", "a tiny LLaVA learns to say what the photos show, from other views of them")
        model = train_captioner(runs.output / "captioner")
        prompts = runs.output / "prompts.txt"
        prompts.write_text(f"{PROMPT}\n")
        console.step("Captions", "by this model, for the selected pictures; SIGKILL once a shard is finished")
        flags = ("--model-path", model, "--prompt-file", prompts, "--max-new-tokens", 64)
        command = words(sys.executable, "tools/curate.py", "caption", "--work", self._work, *flags)
        work = Work.open(self._work)
        with Command(command, runs.output / "logs" / "caption-killed.log") as running:
            while running.running and not work.table("caption", 0).exists():
                time.sleep(0.05)
            running.kill()
        left = sum(not work.table("caption", shard).exists() for shard in range(len(work.inputs)))
        if not left:
            raise StepFailed("all captions were written before the kill: raise PER_CLUSTER")
        console.say(f"killed with {left} of {len(work.inputs)} shards unfinished; the same command goes on")
        self._curate("caption", *flags)
        return left

    def _make_dataset(self, rows: list[Row]) -> tuple[int, int]:
        """The dataset of the curated shards, checked; returns its rows, and those with the caption of their photo."""
        runs = self.runs
        runs.data.mkdir(exist_ok=True)
        tokenizer.train(photos.load_captions().values(), runs.tokenizer)
        runs.tool(
            "tools/preprocess_data.py", "preprocess", "--input", self._work / "build" / "*.parquet",
            "--tokenizer-model", runs.tokenizer, "--output-prefix", runs.data / "curated", "--template", "plain",
            *runs.dataset_flags,
        )  # fmt: skip
        found = check_dataset(rows, runs.data / "curated", runs.tokenizer)
        runs.console.say(
            f"all {found[0]} rows have their own picture, license, URL and old caption; none is there twice"
        )
        return found

    def _summary(
        self, rows: list[Row], fates: Counter[str], killed: int, left: int, right: int
    ) -> list[tuple[str, str]]:
        dropped = [
            (f"  {fate}", str(count))
            for fate, count in sorted(fates.items())
            if fate not in (GOOD, FAILED, UNWANTED)
        ]
        return [
            ("rows of the downloads", f"{len(rows)}, of which {fates[FAILED]} failed to download"),
            ("license not wanted", str(fates[UNWANTED])),
            ("dropped by rules and as copies", ""),
            *dropped,
            ("left for selection", str(fates[GOOD])),
            ("shards captioned after the kill", str(killed)),
            ("rows of the dataset", str(left)),
            ("captions that name the photo", f"{right} of {left}"),
            ("dropped rows to look at", shown(self._work / "filter" / "dropped.html")),
            ("clusters to look at", shown(self._work / "select" / "index.html")),
            ("captions to look at", shown(self._work / "caption" / "index.html")),
            ("time", self.runs.console.elapsed),
        ]


def main() -> int:
    """Read the command line and run; returns the exit status."""
    flags = example_parser(__doc__, "curation").parse_args()
    sizes = ("--image-size", _VISION.image_size, "--teacher-size", _VISION.teacher_size)
    runs = Runs(flags.output, Console(STEPS), sizes)
    opening = (
        "Curation at toy size: downloads -> rules -> duplicates -> clusters -> selection -> captions -> a dataset\n"
        "About five minutes on two idle cores."
    )
    return run_example("curation", runs, opening, Example(runs).run)


if __name__ == "__main__":
    sys.exit(main())
