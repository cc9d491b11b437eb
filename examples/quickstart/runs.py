"""What the examples do alike: datasets, training runs and answers, each by a command of this repository."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folder import NotOurs, keep, prepare
from launch import ROOT, Command, StepFailed, follow, module, read_records, shown, words
from report import Console, main_loss

from megatron_eve.config.errors import ConfigError
from megatron_eve.runtime.command_line import CommandParser, command_parser_of
from megatron_eve.runtime.errors import run_command

RANKS = 4
LAYOUT = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--sequence-parallel")
"""The parallel layout of a run on four processes."""
PROGRESS = 20
"""Iterations between two lines of progress."""

Question = tuple[str, Sequence[str], str]
"""An id, file names of pictures, and the text."""


@dataclass(frozen=True)
class Runs:
    """The folder of an example, and the commands that work in it.

    Attributes:
        output: the folder; it gets `data/`, a folder for each run, and `logs/`.
        console: gets the progress.
        dataset_flags: of the preprocessing, for every dataset.
        ranks: processes of a training run: several in `layout`, or one.
        subfolder: of `output`, for the folders of the runs.
        layout: flags of a run on several processes.
        program: the module that trains.
        tokenizer_path: of the tokenizer in `output`.
    """

    output: Path
    console: Console
    dataset_flags: Sequence[object]
    ranks: int = RANKS
    subfolder: str = ""
    layout: Sequence[object] = LAYOUT
    program: str = "megatron_eve.pretrain"
    tokenizer_path: str = "data/tokenizer.model"

    @property
    def data(self) -> Path:
        """Folder of the datasets and of what they are made of."""
        return self.output / "data"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of all datasets."""
        return self.output / self.tokenizer_path

    def folder(self, run: str) -> Path:
        """Folder of a run."""
        return self.output / self.subfolder / run

    def tool(self, script: str, log: str, *arguments: object, show: bool = True) -> str:
        """Run a script of this repository.

        Args:
            script: its path in the repository.
            log: name of the log that gets what it prints.
            arguments: of its command line.
            show: show the command.

        Returns:
            What it printed.
        """
        if show:
            self._show(["python", script], arguments)
        with Command(words(sys.executable, script, *arguments), self._log(log)) as running:
            return running.wait()

    def preprocess(self, name: str, rows: Path, template: str, *flags: object, show: bool = False) -> str:
        """Make the dataset `data/NAME` of rows; `flags` are further ones. Returns what was printed."""
        return self.tool(
            "tools/preprocess_data.py", f"preprocess-{name}", "--input", rows, "--image-root", self.data / "images",
            "--tokenizer-model", self.tokenizer, "--output-prefix", self.data / name, "--template", template,
            *self.dataset_flags, *flags, show=show,
        )  # fmt: skip

    def train(
        self,
        name: str,
        blend: Sequence[object],
        *flags: object,
        start: str | None = None,
        iterations: int | None = None,
        stop_at: int | None = None,
        log: str | None = None,
        show: bool = True,
    ) -> list[dict[str, Any]]:
        """Train, from the latest checkpoint of the run's folder if it holds one.

        Args:
            name: of the run, so of its folder.
            blend: datasets by name, or weights and names in turns.
            flags: of the program that trains.
            start: the run whose weights this one starts from.
            iterations: of the run, to show its progress; None shows one line at its end.
            stop_at: kill all processes with SIGKILL once this iteration is reported.
            log: name of the log; by default the run's.
            show: show the command.

        Returns:
            All lines of the run's losses.jsonl, those from before a resume among them.

        Raises:
            StepFailed: it failed, or was over before the kill.
        """
        folder, killed = self.folder(name), 0
        losses = folder / "losses.jsonl"
        data = [self.data / word if isinstance(word, str) else word for word in blend]
        arguments = words(
            *flags, *(self.layout if self.ranks > 1 else ()), "--data-path", *data, "--tokenizer-model", self.tokenizer,
            "--save", folder, "--load", folder,
            *(() if start is None else ("--pretrained-checkpoint", self.folder(start))),
        )  # fmt: skip
        torchrun = f"torchrun --nproc-per-node {self.ranks}" if self.ranks > 1 else "python"
        if show:
            self._show([*torchrun.split(), "-m", self.program], arguments)
        with Command(module(self.ranks, self.program, *arguments), self._log(log or name)) as running:
            for record in follow(running, losses):
                iteration = record["iteration"]
                if iterations and (iteration in (1, iterations) or iteration % PROGRESS == 0):
                    self.console.training(record, iterations)
                if stop_at is not None and iteration >= stop_at:
                    killed = running.kill()
                    break
            else:
                running.wait()
        records = read_records(losses)
        last = records[-1]["iteration"]
        if stop_at is not None:
            if last == iterations:
                raise StepFailed("the run was over before the kill: raise training.train_iters in the recipe")
            self.console.say(f"SIGKILL to all {killed} processes after iteration {last}")
        if iterations is None:
            first, end = (main_loss(records[place]) for place in (0, -1))
            self.console.say(
                f"{name}: {len(records)} iterations, loss {first:.4f} -> {end:.4f}   {self.console.elapsed}"
            )
        return records

    def ask(
        self,
        name: str,
        questions: Sequence[Question],
        *flags: object,
        answers: str = "answers",
        show: bool = False,
    ) -> dict[str, str]:
        """Put questions to the model of a run, one process for all of them; answers are greedy.

        Args:
            name: of the run, or of the folder of an export.
            questions: about pictures in `data/images`.
            flags: of `tools/generate.py`.
            answers: name of the file of answers, and of the log.
            show: show the command.

        Returns:
            The answers by id.
        """
        asked, answered = self.output / "questions.jsonl", self.output / f"{answers}.jsonl"
        lines = [{"question_id": key, "image": [*images], "text": text} for key, images, text in questions]
        asked.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        answered.unlink(missing_ok=True)  # those of another model
        self.tool(
            "tools/generate.py", answers, "--model-path", self.folder(name), "--question-file", asked,
            "--image-folder", self.data / "images", "--answers-file", answered, *flags, show=show,
        )  # fmt: skip
        return {row["question_id"]: row["text"] for row in read_records(answered)}

    def ask_learnt(
        self,
        name: str,
        learnt: Sequence[tuple[Sequence[str], str, str]],
        *flags: object,
        answers: str = "answers",
    ) -> list[str]:
        """Ask what a model was trained to answer, and show its answers, and whether they are right word for word.

        Args:
            name: of the run, or of the folder of an export.
            learnt: for each question the file names of its pictures, the text, and the answer of the training data.
            flags: of `tools/generate.py`.
            answers: name of the file of answers, and of the log.

        Returns:
            What the model says to each.
        """
        questions = [(str(number), images, text) for number, (images, text, _) in enumerate(learnt)]
        given = self.ask(name, questions, "--max-new-tokens", 64, *flags, answers=answers, show=True)
        said = [given[key] for key, _, _ in questions]
        for answer, (images, _, trained) in zip(said, learnt, strict=True):
            note = "word for word" if answer == trained else f"but it was trained on: {trained}"
            self.console.say(f"{', '.join(images)}: {answer}", f"    {note}")
        return said

    def _log(self, name: str) -> Path:
        return self.output / "logs" / f"{name}.log"

    def _show(self, program: Sequence[str], arguments: Sequence[object]) -> None:
        self.console.command([shown(word) for word in (*program, *arguments)])


def example_parser(description: str | None, folder: str) -> CommandParser:
    """A command line with the flag --output, by default `folder` in the repository."""
    parser = command_parser_of(description)
    parser.add_argument(
        "--output",
        type=lambda name: Path(name).resolve(),
        default=ROOT / folder,
        metavar="DIR",
        help=f"folder for all that is made (default: {folder})",
    )
    return parser


def run_example(
    name: str, runs: Runs, opening: str, steps: Callable[[], None], *, goes_on: bool = False
) -> int:
    """Prepare the folder of an example and run its steps.

    Args:
        name: in messages.
        runs: of the folder.
        opening: what the example does and how long it takes, for the start.
        steps: all of them.
        goes_on: keep what is in the folder, which the steps then do not make again.

    Returns:
        The exit status: 0, 1 after a step that failed, 2 where the folder is not the example's, 130 after Ctrl-C.
    """

    def run() -> int:
        try:
            (keep if goes_on else prepare)(runs.output)
        except NotOurs as found:
            raise ConfigError(f"{found}: move it away, or choose another folder with --output") from None
        print(
            f"{opening} The commands that it shows can be typed by hand, after\n"
            f"export PATH={Path(sys.executable).parent}:$PATH"
        )
        try:
            steps()
        except StepFailed as failure:
            print(f"\n{name} failed: {failure}", file=sys.stderr)
            return 1
        return 0

    return run_command(run, f"\n{name} stopped, and with it all that it had started")
