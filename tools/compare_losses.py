#!/usr/bin/env python
"""Compare the losses of two commits bit for bit, over the training stages of an example and parallel layouts."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import megatron_eve.runtime.interrupts  # noqa: F401  before modules that take long
from megatron_eve.config.early_flags import flag_value
from megatron_eve.models.registry import DEFAULT_FAMILY
from megatron_eve.runtime.command_line import CommandParser, whole_number
from megatron_eve.runtime.errors import UserError, run_command
from megatron_eve.verification.example import Example, read_example
from megatron_eve.verification.losses import compare, read_losses

DESCRIPTION = """\
Compare the losses of two commits bit for bit: for changes that must not move numbers.

Every stage of --example is trained for some steps by A and by B, under every layout, on the CPU. Data and the
checkpoint that all runs start from are made once, by A. Each loss, gradient norm and choice of samples must be the same
at every iteration. A commit is checked out into a temporary git worktree; both use the Python of this command. Recipes
are each commit's own; what else they need is in the example's comparison.yaml, as it is in the files now.

A line a stage and layout says: equal, or the first iteration that differs. The exit status is 0 if all are equal (or
within --tolerance), 1 if one differs or fails, and 2 for a mistake in the usage.
"""
EXAMPLES = """\
python tools/compare_losses.py HEAD
python tools/compare_losses.py main my-branch --stages 2 \\
    --layouts tp1 pp2-vpp2
"""
ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = Path("examples") / f"{DEFAULT_FAMILY}_tiny"
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp1": (1, ()),
    "tp2-sp": (2, ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
    "pp2-vpp2": (2, ("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1")),
    "cp2": (2, ("--context-parallel-size", "2")),
    "dp2": (2, ()),
}
"""Name -> ranks, flags."""


class RunFailed(Exception):
    """A command failed; the message names it and shows the end of its output."""


@dataclass(frozen=True)
class Tree:
    """A copy of this repository to run commands in.

    Attributes:
        name: "A" or "B".
        root: its top folder.
    """

    name: str
    root: Path

    def run(self, log: Path, *words: object) -> None:
        """Run `python WORDS` in this tree, with its packages before any installed ones, and wait for the end.

        Raises:
            RunFailed: the command's status was not 0.
        """
        # One thread a rank keeps the order of additions the same in every run. No GPU: it would add in any order.
        mine = {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, *(str(word) for word in words)],
                cwd=self.root,
                env={**os.environ, **mine},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            try:
                status = process.wait()
            finally:
                _kill(process)
        if status != 0:
            output = log.read_text(encoding="utf-8", errors="replace").splitlines()
            # torchrun's own report about its ranks does not show the cause.
            end = next(
                (i for i, line in enumerate(output) if "torch/distributed/elastic" in line), len(output)
            )
            last = "\n".join(f"    {line}" for line in output[:end][-15:])
            raise RunFailed(f"{self.name}: the command ended with status {status}:\n{last}")

    def pretrain(self, log: Path, ranks: int, *flags: object) -> None:
        """Run `megatron_eve.pretrain` on some ranks.

        Raises:
            RunFailed: its exit status was not 0.
        """
        torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        self.run(log, *(torchrun if ranks > 1 else ()), "-m", "megatron_eve.pretrain", *flags)

    def check(self, log: Path) -> None:
        """Check that commands in this tree import its own package, not an installed one.

        Raises:
            UserError: they import another one.
        """
        self.run(log, "-c", "import megatron_eve; print(megatron_eve.__file__)")
        found = Path(log.read_text(encoding="utf-8").splitlines()[-1]).resolve()
        if not found.is_relative_to(self.root):
            raise UserError(f"{self.name}: {self.root} imports megatron_eve from {found}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a command that still runs, and the ranks that it started, by process id."""
    if process.poll() is not None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        # torchrun starts every rank in a session of its own, which a signal to a process group would not reach.
        everything = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(everything, timeout=10)
    process.wait()


@dataclass(frozen=True)
class Inputs:
    """The inputs of all runs, made by one tree.

    Attributes:
        folder: with these inputs.
        recipes: the folder of the recipes, relative to the root of a tree.
        example: what they need.
    """

    folder: Path
    recipes: Path
    example: Example

    def make(self, tree: Tree) -> None:
        """Write tokenizer, datasets, what the example's own commands make, and the starting checkpoint.

        Raises:
            RunFailed: a command of this tree failed.
            UserError: scikit-image, whose pictures are the data, is missing.
        """
        sys.path.insert(0, str(tree.root / "examples" / "quickstart"))
        try:
            photos, tokenizer = importlib.import_module("photos"), importlib.import_module("tokenizer")
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed: make install installs it") from error
        captions = photos.export(self.folder)
        tokenizer.train(photos.load_captions().values(), self.folder / "tokenizer.model")
        conversations = self.folder / "conversations.json"
        rows = json.loads(captions.read_text(encoding="utf-8"))
        conversations.write_text(json.dumps(as_conversations(rows)), encoding="utf-8")
        for template, source in (("plain", captions), ("vicuna_v1", conversations)):
            tree.run(
                self.folder / "preprocess.log", "tools/preprocess_data.py", "--input", source,
                "--image-root", self.folder / "images", "--tokenizer-model", self.folder / "tokenizer.model",
                "--output-prefix", self.folder / template, "--template", template, "--workers", 1,
                *self._filled(self.example.preprocessing),
            )  # fmt: skip
        for command in self.example.commands:
            tree.run(self.folder / "command.log", *self._filled(command))
        start = ("--train-iters", 1, "--save", self.folder / "start")
        tree.pretrain(self.folder / "start.log", 1, *self.flags(self.example.starts_with), *start)

    def flags(self, stage: int) -> tuple[object, ...]:
        """Flags of a run of a stage, except layout and length."""
        return (
            "--config", self.recipes / f"stage{stage}.yaml", "--data-path", self.folder / self.example.templates[stage],
            "--tokenizer-model", self.folder / "tokenizer.model", *self._filled(self.example.flags),
        )  # fmt: skip

    def _filled(self, words: Sequence[str]) -> list[str]:
        return [word.replace("{inputs}", str(self.folder)) for word in words]


def as_conversations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Captions as conversations of two turns; every fifth row has no image.

    Args:
        rows: of the LLaVA layout, each a question and a caption.
    """
    found = []
    for i, row in enumerate(rows):
        question, answer = row["conversations"]
        turns = [
            question,
            answer,
            {"from": "human", "value": "What is shown in the image?"},
            {"from": "gpt", "value": answer["value"].lower()},
        ]
        if i % 5 == 4:
            found.append({"id": row["id"], "conversations": turns[2:]})
        else:
            found.append({**row, "conversations": turns})
    return found


def compare_trees(
    trees: Sequence[Tree],
    inputs: Inputs,
    stages: Sequence[int],
    layouts: Sequence[str],
    steps: int,
    tolerance: float,
) -> int:
    """Run every stage under every layout in both trees and print a line for each; returns how many are wrong."""
    folder = inputs.folder.parent
    inputs.folder.mkdir()
    try:
        for tree in trees:
            tree.check(folder / "import.log")
        inputs.make(trees[0])
    except RunFailed as failure:
        raise UserError(f"what all runs start from could not be made. {failure}") from failure
    print(f"{'stage':<7}{'layout':<10}result", flush=True)
    wrong = 0
    for stage in stages:
        for layout in layouts:
            fine, text = _compare_runs(trees, inputs, stage, layout, steps, tolerance)
            wrong += not fine
            print(f"{stage:<7}{layout:<10}{text}", flush=True)
    return wrong


def _compare_runs(
    trees: Sequence[Tree], inputs: Inputs, stage: int, layout: str, steps: int, tolerance: float
) -> tuple[bool, str]:
    """One stage under one layout in both trees; returns whether the losses are as expected, and a text about them."""
    folder = inputs.folder.parent
    ranks, flags = LAYOUTS[layout]
    records = []
    for tree in trees:
        save = folder / f"{tree.name}_stage{stage}_{layout}"
        try:
            tree.pretrain(
                folder / "run.log", ranks, *inputs.flags(stage), *flags, "--train-iters", steps,
                "--pretrained-checkpoint", inputs.folder / "start", "--save", save,
            )  # fmt: skip
        except RunFailed as failure:
            return False, f"failed. {failure}"
        records.append(read_losses(save / "losses.jsonl"))
        shutil.rmtree(save)
    found = compare(records[0], records[1])
    fine = found.largest <= tolerance and (tolerance > 0 or found.first is None)
    return fine, found.text + (" (within --tolerance)" if fine and found.first is not None else "")


def _git(*words: str) -> str:
    """Output of a git command in this repository.

    Raises:
        UserError: it failed, or there is no git.
    """
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise UserError("git is not installed: this command needs it to check out commits") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"git {' '.join(words)}: {error.stderr.strip()}") from error
    return done.stdout.strip()


@contextlib.contextmanager
def checked_out(name: str, commit: str | None, folder: Path) -> Iterator[Tree]:
    """A commit in a temporary worktree, or, for None, the files of this repository as they are.

    Args:
        name: "A" or "B".
        commit: anything that git takes for one.
        folder: where the worktree goes.

    Raises:
        UserError: there is no such commit.
    """
    if commit is None:
        yield Tree(name, ROOT)
        return
    try:
        found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}")
    except UserError as error:
        raise UserError(f"{name}: there is no commit {commit!r} in {ROOT}") from error
    root = folder / name
    try:
        _git("worktree", "add", "--quiet", "--detach", str(root), found)
        yield Tree(name, root.resolve())
    finally:
        # --force twice also removes a worktree that was interrupted while git made it.
        remove = ("git", "worktree", "remove", "--force", "--force", str(root))
        subprocess.run(remove, cwd=ROOT, capture_output=True, check=False)


def build_parser(stages: Sequence[int]) -> argparse.ArgumentParser:
    """The flags, for an example with these stages."""
    parser = CommandParser(description=DESCRIPTION, examples=EXAMPLES)
    parser.add_argument("a", metavar="A", help="commit, branch or tag")
    parser.add_argument(
        "b",
        metavar="B",
        nargs="?",
        help="commit, branch or tag to compare A with (default: the files as they are now)",
    )
    parser.add_argument(
        "--example",
        type=Path,
        default=EXAMPLE,
        metavar="DIR",
        help="folder of the recipes to train (stage1.yaml ...) and their comparison.yaml, relative to the root of the "
        "repository; both commits need it",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        type=int,
        choices=stages,
        default=stages,
        help="training stages to run (default: all)",
    )
    parser.add_argument(
        "--layouts",
        nargs="+",
        choices=LAYOUTS,
        default=tuple(LAYOUTS),
        help="parallel layouts to run each stage under (default: all)",
    )
    parser.add_argument(
        "--steps", type=whole_number(1), default=20, metavar="N", help="optimizer steps of each run"
    )
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        default=0.0,
        metavar="X",
        help="largest accepted relative difference of a loss or gradient norm (default: 0, equal bit for bit)",
    )
    return parser


def _tolerance(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word}: must be a number") from None
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{word}: must be 0 or more and below 1")
    return value


def compare_commits(flags: argparse.Namespace, example: Example) -> int:
    """What the flags ask for; returns the exit status."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="compare_losses_") as name, contextlib.ExitStack() as stack:
        folder = Path(name).resolve()
        trees = [stack.enter_context(checked_out(n, c, folder)) for n, c in (("A", flags.a), ("B", flags.b))]
        inputs = Inputs(folder / "inputs", flags.example, example)
        wrong = compare_trees(trees, inputs, flags.stages, flags.layouts, flags.steps, flags.tolerance)
    total = len(flags.stages) * len(flags.layouts)
    print(f"{total - wrong} of {total} as wanted, {time.monotonic() - started:.0f} s")
    return 1 if wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""

    def run() -> int:
        # Which stages there are, and so which values --stages takes, follows from the example.
        example = read_example(ROOT / (flag_value(argv, "--example") or EXAMPLE))
        return compare_commits(build_parser(example.stages).parse_args(argv), example)

    return run_command(run)


if __name__ == "__main__":
    # Worktrees are removed in that case, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
