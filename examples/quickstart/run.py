"""The quickstart: pretrain a toy EVE model on real photos with tensor and pipeline parallelism, on two cores.

It makes a dataset from pictures and captions, trains stage 2 on four processes (TP 2 x PP 2), trains once more
and kills that run halfway, resumes it, requires that every loss equals the uninterrupted run's bit for bit, and
lets the model caption three of the photos: it has learnt them by heart, so the pixels reach the words.

    python examples/quickstart/run.py
    make quickstart
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from installed import installed_by

with installed_by("make quickstart", "matplotlib"):
    import photos
    import tokenizer
    from launch import ROOT, StepFailed, shown
    from report import Console, Outcome, Records, plot, table
    from runs import RANKS, Runs, example_parser, run_example
    from same_losses import require_same_losses

    from megatron_eve.config.errors import ConfigError
    from megatron_eve.config.recipe import load_recipe
    from megatron_eve.config.schema import RunConfig

STEPS = 9
ASKED = ("chelsea", "coffee", "rocket")
"""The photos that the model captions at the end."""


@dataclass(frozen=True)
class Quickstart:
    """The steps, each of which raises `StepFailed` where something is not as it must be.

    Attributes:
        runs: the folder that the quickstart owns.
        recipe: YAML of the training runs.
        iterations: of a training run.
        kill_at: iteration after which the second run is killed.
    """

    runs: Runs
    recipe: Path
    iterations: int
    kill_at: int

    def run(self) -> None:
        """All nine steps, the table, the picture."""
        runs, iterations, kill_at = self.runs, self.iterations, self.kill_at
        step = runs.console.step
        self._make_dataset()
        step(
            "Teacher",
            "a tiny vision tower with random weights in place of CLIP ViT-L/14-336, so nothing is downloaded",
        )
        teacher = runs.output / "teacher"
        runs.tool("examples/toy_teacher.py", "teacher", teacher)

        def train(name: str, **settings: Any) -> Records:
            return runs.train(
                name, ("photos",), "--config", self.recipe, "--teacher-model", teacher,
                "--tensorboard-dir", runs.folder(name) / "tensorboard", iterations=iterations, **settings,
            )  # fmt: skip

        step(
            "Pretraining, uninterrupted", f"EVE's stage 2 as TP 2 x PP 2 on {RANKS} processes: the reference"
        )
        reference = train("reference")
        step("The same once more, and a kill", f"in another folder; SIGKILL at about iteration {kill_at}")
        before = train("interrupted", stop_at=kill_at)
        step("Resuming", "the same command again; it goes on from the latest whole checkpoint")
        interrupted = train("interrupted", log="resumed", show=False)
        step("Comparing", "every loss of the interrupted run with the uninterrupted one's, bit for bit")
        require_same_losses(reference, interrupted, iterations)
        runs.console.say(f"equal at all {iterations} iterations, those after the resume included")
        step(
            "Captioning",
            "one process reads the checkpoint of the four and describes photos it was trained on",
        )
        captions = photos.load_captions()
        pictures = {row["id"]: row["image"] for row in json.loads((runs.data / "captions.json").read_text())}
        learnt = [([pictures[photo]], "", captions[photo]) for photo in ASKED]
        said = runs.ask_learnt("interrupted", learnt, "--conv-mode", "plain")
        right = sum(caption == captions[photo] for caption, photo in zip(said, ASKED, strict=True))
        outcome = Outcome(reference, before, interrupted[len(before) :])
        picture = runs.output / "loss.png"
        shots = [runs.data / "images" / pictures[photo] for photo in ASKED]
        plot(outcome, list(zip(shots, said, strict=True)), picture)
        rows = [
            ("layout", f"TP 2 with sequence parallelism x PP 2, {RANKS} processes"),
            *outcome.rows(),
            ("captions word for word", f"{right} of {len(ASKED)}"),
            ("losses and captions drawn in", shown(picture)),
            ("time", runs.console.elapsed),
        ]
        print("\n" + table(rows))
        print(
            f"What the commands printed is in {shown(runs.output / 'logs')}. Next: your own data (README.md), or this\n"
            "model taught to talk about a picture, without a GPU (docs/first_run.md, the last section)."
        )
        if right < len(ASKED):
            raise StepFailed("a caption is not the one that the model was trained on")

    def _make_dataset(self) -> None:
        """Steps 1 to 3: pictures and captions, a tokenizer, the indexed dataset that training reads."""
        captions, runs, console = photos.load_captions(), self.runs, self.runs.console
        console.step(
            "Photos", f"{len(captions)} pictures that scikit-image brings along, a sentence for each"
        )
        rows = photos.export(runs.data)
        console.say(f"-> {shown(rows)} (the LLaVA layout), {shown(runs.data / 'images')}")

        pieces = tokenizer.VOCAB_SIZE
        console.step(
            "Tokenizer", f"sentencepiece with Llama's traits, {pieces} pieces learnt from the captions"
        )
        console.say(f"-> {shown(tokenizer.train(captions.values(), runs.tokenizer))}")

        console.step(
            "Dataset", "captions become token ids, images keep their bytes; both are indexed and mapped"
        )
        output = runs.preprocess("photos", rows, "plain", "--workers", 2, show=True)
        console.say(*(line for line in output.splitlines() if line and not line.startswith("preprocess:")))


def kill_point(config: RunConfig, recipe: Path) -> int:
    """An iteration near the middle of a run, some steps after a checkpoint.

    Raises:
        ConfigError: the run saves no checkpoint before its middle.
    """
    every, middle = config.checkpoint.save_interval, config.total_iterations // 2
    if not every or every > middle:
        raise ConfigError(
            f"--config {recipe}: must save before the middle of the run, where it is killed; set "
            f"checkpoint.save_interval to {middle} or less"
        )
    return middle // every * every + max(1, every // 3)


def main() -> int:
    """Read the command line and run; returns the exit status."""
    parser = example_parser(__doc__, "quickstart")
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "examples/eve_tiny/stage2.yaml",
        metavar="FILE",
        help="recipe of the training runs (default: examples/eve_tiny/stage2.yaml)",
    )
    arguments = parser.parse_args()
    recipe = arguments.config.resolve()
    try:
        config = load_recipe(recipe)
        kill_at = kill_point(config, recipe)
    except ConfigError as mistake:
        parser.error(str(mistake))
    vision = config.vision
    sizes = ("--image-size", vision.image_size, "--teacher-size", vision.teacher_size)
    runs = Runs(arguments.output, Console(STEPS), sizes)
    opening = (
        "megatron_eve quickstart: photos and captions -> dataset -> pretraining, a kill, a resume -> captions\n"
        "About five minutes on two idle cores."
    )
    return run_example(
        "quickstart", runs, opening, Quickstart(runs, recipe, config.total_iterations, kill_at).run
    )


if __name__ == "__main__":
    sys.exit(main())
