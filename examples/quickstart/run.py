"""The quickstart: pretrain a toy EVE model on real photos with tensor and pipeline parallelism, on two cores.

It makes a dataset from pictures and captions, trains stage 2 on four processes (TP 2 x PP 2), trains once more
and kills that run halfway, resumes it, requires that every loss equals the uninterrupted run's bit for bit, and
lets the model caption three of the photos: it has learnt them by heart, so the pixels reach the words.

    python examples/quickstart/run.py
    make quickstart
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folder import NotOurs, check, prepare

NEEDED = "is not installed: make quickstart installs it, or pip install '.[quickstart]'"

try:
    import photos
    import tokenizer
    from launch import ROOT, Command, StepFailed, follow, module, read_records, shown, words
    from report import Console, Outcome, plot, table
    from same_losses import require_same_losses

    from megatron_eve.config.errors import ConfigError
    from megatron_eve.config.recipe import load_recipe
    from megatron_eve.config.schema import RunConfig
    from megatron_eve.runtime.command_line import command_parser_of
except ModuleNotFoundError as error:
    print(f"error: {error.name} {NEEDED}", file=sys.stderr)
    sys.exit(2)

RANKS = 4
STEPS = 9
LAYOUT = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--sequence-parallel")
ASKED = ("chelsea", "coffee", "rocket")
"""The photos that the model captions at the end."""


@dataclass(frozen=True)
class Quickstart:
    """The steps, each a method that raises `StepFailed` where something is not as it must be.

    Attributes:
        output: the folder that the quickstart owns.
        recipe: YAML of the training runs.
        config: what the recipe says.
        console: gets the progress.
    """

    output: Path
    recipe: Path
    config: RunConfig
    console: Console

    @property
    def _data(self) -> Path:
        return self.output / "data"

    @property
    def _teacher(self) -> Path:
        return self.output / "teacher"

    @property
    def _tokenizer(self) -> Path:
        return self._data / "tokenizer.model"

    def run(self) -> None:
        """All nine steps, the table, the picture."""
        step, iterations, kill_at = self.console.step, self.config.total_iterations, self._kill_point()
        prepare(self.output)
        self.make_dataset()
        self.make_teacher()
        step(
            "Pretraining, uninterrupted", f"EVE's stage 2 as TP 2 x PP 2 on {RANKS} processes: the reference"
        )
        self.train("reference", log="reference")
        step("The same once more, and a kill", f"in another folder; SIGKILL at about iteration {kill_at}")
        killed = self.train("interrupted", log="interrupted", stop_at=kill_at)
        if killed >= iterations:
            raise StepFailed("the run was over before the kill: raise training.train_iters in the recipe")
        step("Resuming", "the same command again; it goes on from the latest whole checkpoint")
        self.train("interrupted", log="resumed")
        step("Comparing", "every loss of the interrupted run with the uninterrupted one's, bit for bit")
        reference, interrupted = self._losses("reference"), self._losses("interrupted")
        require_same_losses(reference, interrupted, iterations)
        self.console.say(f"equal at all {iterations} iterations, those after the resume included")
        step(
            "Captioning",
            "one process reads the checkpoint of the four and describes photos it was trained on",
        )
        captions = self.caption()
        right = sum(said == trained for _, said, trained in captions)
        outcome = Outcome(reference, interrupted[:killed], interrupted[killed:])
        picture = self.output / "loss.png"
        plot(outcome, [(photo, said) for photo, said, _ in captions], picture)
        rows = [
            ("layout", f"TP 2 with sequence parallelism x PP 2, {RANKS} processes"),
            *outcome.rows(),
            ("captions word for word", f"{right} of {len(ASKED)}"),
            ("losses and captions drawn in", shown(picture)),
            ("time", self.console.elapsed),
        ]
        print("\n" + table(rows))
        print(
            f"What the commands printed is in {shown(self.output / 'logs')}. Next: your own data (README.md), or this\n"
            "model taught to talk about a picture, without a GPU (docs/first_run.md, the last section)."
        )
        if right < len(ASKED):
            raise StepFailed("a caption is not the one that the model was trained on")

    def make_dataset(self) -> None:
        """Steps 1 to 3: pictures and captions, a tokenizer, the indexed dataset that training reads."""
        captions, console, vision = photos.load_captions(), self.console, self.config.vision
        console.step(
            "Photos", f"{len(captions)} pictures that scikit-image brings along, a sentence for each"
        )
        rows = photos.export(self._data)
        console.say(f"-> {shown(rows)} (the LLaVA layout), {shown(self._data / 'images')}")

        pieces = tokenizer.VOCAB_SIZE
        console.step(
            "Tokenizer", f"sentencepiece with Llama's traits, {pieces} pieces learnt from the captions"
        )
        console.say(f"-> {shown(tokenizer.train(captions.values(), self._tokenizer))}")

        console.step(
            "Dataset", "captions become token ids, images keep their bytes; both are indexed and mapped"
        )
        arguments = words(
            "--input", rows, "--image-root", self._data / "images", "--tokenizer-model", self._tokenizer,
            "--output-prefix", self._data / "photos", "--template", "plain", "--image-size", vision.image_size,
            "--teacher-size", vision.teacher_size, "--workers", 2,
        )  # fmt: skip
        self._announce("python tools/preprocess_data.py", arguments)
        command = [sys.executable, "tools/preprocess_data.py", *arguments]
        with Command(command, self._log("preprocess")) as running:
            output = running.wait()
        console.say(*(line for line in output.splitlines() if line and not line.startswith("preprocess:")))

    def make_teacher(self) -> None:
        """Step 4: a stand-in for CLIP, which the aligning layer learns to imitate."""
        self.console.step(
            "Teacher",
            "a tiny vision tower with random weights in place of CLIP ViT-L/14-336, so nothing is downloaded",
        )
        arguments = words(self._teacher)
        self._announce("python examples/toy_teacher.py", arguments)
        with Command(
            [sys.executable, "examples/toy_teacher.py", *arguments], self._log("teacher")
        ) as running:
            running.wait()

    def train(self, name: str, log: str, stop_at: int | None = None) -> int:
        """Train on four ranks, from the latest checkpoint of the run's folder if it holds one.

        Args:
            name: of the run, so of its folder.
            log: name for the log.
            stop_at: kill all its processes with SIGKILL once this iteration is reported.

        Returns:
            The last iteration that was reported.
        """
        folder, iterations, iteration = self.output / name, self.config.total_iterations, 0
        arguments = words(
            "--config", self.recipe, *LAYOUT, "--data-path", self._data / "photos",
            "--tokenizer-model", self._tokenizer, "--teacher-model", self._teacher,
            "--save", folder, "--load", folder, "--tensorboard-dir", folder / "tensorboard",
        )  # fmt: skip
        if log == name:  # a resume is the same command again
            self._announce(f"torchrun --nproc-per-node {RANKS} -m megatron_eve.pretrain", arguments)
        with Command(module(RANKS, "megatron_eve.pretrain", *arguments), self._log(log)) as running:
            for record in follow(running, folder / "losses.jsonl"):
                iteration = record["iteration"]
                if iteration in (1, iterations) or iteration % 20 == 0:
                    self.console.training(record, iterations)
                if stop_at is not None and iteration >= stop_at:
                    killed = running.kill()
                    iteration = self._losses(name)[-1]["iteration"]
                    self.console.say(f"SIGKILL to all {killed} processes after iteration {iteration}")
                    return iteration
            running.wait()
        return iteration

    def caption(self) -> list[tuple[Path, str, str]]:
        """Caption three training photos greedily.

        Returns:
            For each the picture, what the model says, and the caption that it was trained on.
        """
        dataset = json.loads((self._data / "captions.json").read_text(encoding="utf-8"))
        rows = {row["id"]: row for row in dataset}
        questions, answers = self.output / "questions.jsonl", self.output / "answers.jsonl"
        lines = [json.dumps({"question_id": name, "image": rows[name]["image"]}) for name in ASKED]
        questions.write_text("\n".join(lines) + "\n", encoding="utf-8")
        arguments = words(
            "--model-path", self.output / "interrupted", "--tokenizer-model", self._tokenizer, "--conv-mode", "plain",
            "--question-file", questions, "--image-folder", self._data / "images", "--answers-file", answers,
            "--max-new-tokens", 64,
        )  # fmt: skip
        self._announce("python tools/generate.py", arguments)
        with Command([sys.executable, "tools/generate.py", *arguments], self._log("generate")) as running:
            running.wait()
        given = {row["question_id"]: row["text"] for row in read_records(answers)}
        captions = []
        for name in ASKED:
            picture, trained = rows[name]["image"], rows[name]["conversations"][-1]["value"]
            note = "word for word" if given[name] == trained else f"but it was trained on: {trained}"
            self.console.say(f"{picture}: {given[name]}", f"    {note}")
            captions.append((self._data / "images" / picture, given[name], trained))
        return captions

    def _kill_point(self) -> int:
        """An iteration near the middle of the run, some steps after a checkpoint."""
        every, middle = self.config.checkpoint.save_interval, self.config.total_iterations // 2
        if not every or every > middle:
            raise StepFailed(
                f"{self.recipe} must save before the middle of the run (checkpoint.save_interval)"
            )
        return middle // every * every + max(1, every // 3)

    def _losses(self, name: str) -> list[dict[str, Any]]:
        return read_records(self.output / name / "losses.jsonl")

    def _log(self, name: str) -> Path:
        return self.output / "logs" / f"{name}.log"

    def _announce(self, command: str, arguments: list[str]) -> None:
        self.console.command([shown(word) for word in [*command.split(), *arguments]])


def main() -> int:
    """Read the command line and run; returns the exit status."""
    parser = command_parser_of(__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "quickstart",
        metavar="DIR",
        help="folder for all that is made (default: quickstart)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "examples/eve_tiny/stage2.yaml",
        metavar="FILE",
        help="recipe of the training runs (default: examples/eve_tiny/stage2.yaml)",
    )
    arguments = parser.parse_args()
    recipe, output = arguments.config.resolve(), arguments.output.resolve()
    try:
        if (
            importlib.util.find_spec("matplotlib") is None
        ):  # wanted at the end, so it is asked for at the start
            raise ConfigError(f"matplotlib {NEEDED}")
        config = load_recipe(recipe)
        check(output)
    except NotOurs as found:
        return refuse(f"{found}: move it away, or choose another folder with --output")
    except ConfigError as mistake:
        return refuse(str(mistake))
    print(
        "megatron_eve quickstart: photos and captions -> dataset -> pretraining, a kill, a resume -> captions\n"
        "About five minutes on two idle cores. The commands that it shows can be typed by hand, after\n"
        f"export PATH={Path(sys.executable).parent}:$PATH"
    )
    try:
        Quickstart(output, recipe, config, Console(STEPS)).run()
    except StepFailed as failure:
        print(f"\nquickstart failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nquickstart stopped, and with it all that it had started", file=sys.stderr)
        return 130
    return 0


def refuse(sentence: str) -> int:
    """Say what is wrong with the command line or the environment; returns the exit status for it."""
    print(f"error: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
