"""EVE v2 at toy size: stages 0, 1 and 3 on real photos with tensor and pipeline parallelism, on two cores.

A language model with random weights gets a patch embedding, which trains alone in stage 0. Stage 1 begins with experts
that are copies of the language model's weights, and trains them; stage 3 trains all weights on questions about photos.
All stages run as TP 2 x PP 2. Stage 3 is killed with SIGKILL and resumed, and its losses must equal an uninterrupted
run's bit for bit. Then the model answers what it was trained on, word for word, which is learning by heart; where the
photos of two questions are swapped, so must be the answers; and transformers gives the same words from the export.

    python examples/eve2_tiny/run.py
    make eve2
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]  # which has what the examples need alike

from installed import installed_by  # noqa: E402

with installed_by("make eve2"):
    import photos
    from eve2_tiny import inputs
    from eve2_tiny.language_model import PRESET, save_language_model
    from eve2_tiny.transformers_answers import ask_transformers
    from launch import StepFailed, shown
    from report import Console, Records, table
    from runs import RANKS, Runs, example_parser, run_example
    from same_losses import require_same_losses

    from megatron_eve.config.presets import PRESETS
    from megatron_eve.config.recipe import load_recipe

STEPS = 9
COMPARED, KILL_AT = 30, 25
"""Iterations of stage 3's uninterrupted run, and the iteration after which the other run is killed."""
COPIED = "has no experts, so those of this run begin as copies of its weights"
"""What a run says that makes experts of the weights that it starts from."""


@dataclass(frozen=True)
class Result:
    """Answers to `inputs.learnt`.

    Attributes:
        said: by tools/generate.py.
        exported: by transformers from the export.
        trained: of the training data.
    """

    said: Sequence[str]
    exported: Sequence[str]
    trained: Sequence[str]

    @property
    def right(self) -> int:
        """Answers that are the trained ones word for word."""
        return sum(one == other for one, other in zip(self.said, self.trained, strict=True))

    @property
    def same(self) -> int:
        """Answers that transformers gives, too."""
        return sum(one == other for one, other in zip(self.said, self.exported, strict=True))

    @property
    def swapped(self) -> int:
        """Questions that get the other photo's answer once their photos are swapped."""
        (first, second), (swapped_first, swapped_second) = self.said[:2], self.said[-2:]
        return (first == swapped_second != swapped_first) + (second == swapped_first != swapped_second)


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
        rows = self._make_inputs()
        step("Stage 0", f"the patch embedding alone trains on captions, as TP 2 x PP 2 on {RANKS} processes")
        stage0 = self._train("stage0", 0, "captions", start="start")
        step("Stage 1", "experts for the rows of photos begin as copies, and train with the patch embedding")
        stage1 = self._train("stage1", 1, "captions", start="stage0")
        self._show_the_copy()
        stage3, killed = self._stage3()
        step("Answers", "one process tells what three photos show, two of them swapped as well")
        learnt = inputs.learnt(rows)
        said = runs.ask_learnt("stage3", learnt, "--conv-mode", inputs.TEMPLATE)
        step("Export", "to a folder for transformers, which answers the same questions")
        exported = self._ask_exported(learnt)
        result = Result(said, exported, [answer for _, _, answer in learnt])
        table_rows = [
            ("layout", f"TP 2 with sequence parallelism x PP 2, {RANKS} processes"),
            ("language loss of stage 0", _losses(stage0)),
            ("language loss of stage 1", _losses(stage1)),
            ("language loss of stage 3", _losses(stage3)),
            ("killed, resumed", f"after iteration {killed}; {COMPARED} losses equal bit for bit"),
            ("answers word for word", f"{result.right} of {len(learnt)}, learnt by heart"),
            ("swapped photos swap answers", f"{result.swapped} of {inputs.SWAPPED}"),
            ("the same from transformers", f"{result.same} of {len(learnt)}"),
            ("time", runs.console.elapsed),
        ]
        print("\n" + table(table_rows))
        print(f"What the commands printed is in {shown(runs.output / 'logs')}.")
        check_claims(stage3, result)

    def _make_inputs(self) -> list[inputs.Row]:
        """Photos, the language model and its checkpoint, both datasets; returns the captions as rows."""
        runs, console = self.runs, self.runs.console
        console.step("Photos", "pictures of scikit-image with a sentence each, and questions about them")
        captions = photos.export(runs.data)
        rows: list[inputs.Row] = json.loads(captions.read_text(encoding="utf-8"))
        console.say(
            f"-> {shown(captions)}, {shown(inputs.write_questions(captions, runs.data / 'questions.json'))}"
        )
        console.step(
            "Language model", "Qwen2's architecture with random weights, and a tokenizer like Qwen2.5's"
        )
        folder = save_language_model(runs.tokenizer.parent, inputs.texts(rows))
        console.say(f"-> {shown(folder)}")
        runs.tool(
            "tools/convert_checkpoint.py", "import", "import", "--source", folder, "--target", runs.folder("start"),
            "--family", "eve2", "--patch-embedding-size", PRESETS[PRESET].vision.patch_embedding_size,
        )  # fmt: skip
        console.step("Datasets", "captions for stages 0 and 1, questions for stage 3")
        for name, template in (("captions", "eve2_plain"), ("questions", inputs.TEMPLATE)):
            runs.preprocess(name, runs.data / f"{name}.json", template, show=True)
        return rows

    def _train(
        self, name: str, stage: int, dataset: str, *flags: object, **settings: Any
    ) -> list[dict[str, Any]]:
        recipe = EXAMPLES / "eve2_tiny" / f"stage{stage}.yaml"
        iterations = load_recipe(recipe).total_iterations
        return self.runs.train(
            name, (dataset,), "--config", recipe, *flags, iterations=iterations, **settings
        )

    def _show_the_copy(self) -> None:
        """Show the line in which stage 1 says what its experts are."""
        log = (self.runs.output / "logs" / "stage1.log").read_text(encoding="utf-8")
        line = next((line for line in log.splitlines() if COPIED in line), None)
        if line is None:
            raise StepFailed("stage 1 did not say that its experts begin as copies of stage 0's weights")
        self.runs.console.say(line)

    def _stage3(self) -> tuple[Records, int]:
        """An uninterrupted run of the first iterations, and the whole of it with a kill.

        Returns:
            The records of the latter from its first to its last iteration, and after which iteration it was killed.
        """
        console = self.runs.console
        console.step("Stage 3", f"all weights train on questions; {COMPARED} iterations for comparison")
        reference = self._train("reference", 3, "questions", "--exit-interval", COMPARED, start="stage1")
        console.step("Stage 3 again", f"SIGKILL at about iteration {KILL_AT}; then all of it")
        killed = len(self._train("stage3", 3, "questions", start="stage1", stop_at=KILL_AT))
        records = self._train("stage3", 3, "questions", start="stage1", log="resumed", show=False)
        require_same_losses(reference, [one for one in records if one["iteration"] <= COMPARED], COMPARED)
        console.say(f"equal at the first {COMPARED} iterations, those after the resume included")
        return [*records[: records[killed]["iteration"] - 1], *records[killed:]], killed

    def _ask_exported(self, learnt: Sequence[inputs.Learnt]) -> list[str]:
        """Export, and ask transformers; returns its answers."""
        runs = self.runs
        runs.tool(
            "tools/convert_checkpoint.py", "export", "export", "--source", runs.folder("stage3"), "--target",
            runs.folder("export"), "--tokenizer", runs.tokenizer, "--format", "transformers", "--dtype", "float32",
        )  # fmt: skip
        answers = ask_transformers(runs.folder("export"), learnt, runs.data / "images")
        runs.console.say(*answers)
        return answers


def check_claims(records: Records, result: Result) -> None:
    """Check what the example claims.

    Args:
        records: of stage 3, from its first to its last iteration.
        result: the answers.

    Raises:
        StepFailed: a claim does not hold; the message is one sentence.
    """
    asked = len(result.trained)
    if not records[-1]["lm_loss"] < 0.1 * records[0]["lm_loss"]:
        raise StepFailed(f"the language loss of stage 3 did not fall to a tenth: {_losses(records)}")
    if result.swapped < inputs.SWAPPED:
        raise StepFailed("with its photos swapped, a question does not get the answer of the other photo")
    if result.right < asked:
        raise StepFailed("an answer is not the one that the model was trained on")
    if result.same < asked:
        raise StepFailed("transformers gives another answer from the export")


def _losses(records: Records) -> str:
    return f"{records[0]['lm_loss']:.4f} at the start, {records[-1]['lm_loss']:.4f} at the end"


def main() -> int:
    """Read the command line and run; returns the exit status."""
    flags = example_parser(__doc__, "eve2").parse_args()
    console = Console(STEPS)
    runs = Runs(flags.output, console, inputs.DATASET_FLAGS, tokenizer_path="language_model/tokenizer.json")
    opening = (
        "EVE v2 at toy size: photos -> stages 0, 1 and 3, a kill, a resume -> answers -> transformers\n"
        "About eleven minutes of CPU time, shared by two cores."
    )
    return run_example("eve2", runs, opening, Example(runs).run)


if __name__ == "__main__":
    sys.exit(main())
