"""VILA at toy size: three stages on real photos with tensor and pipeline parallelism, on two cores.

It makes datasets of captions, interleaved documents, conversations and text, gives a vision tower with random weights
to a language model with random weights, and trains the three stages as TP 2 x PP 2. Stage 2 is killed halfway and
resumed, and its losses must equal an uninterrupted run's bit for bit. Then the model captions three photos and is asked
about the second of two, stage 3 runs once more with LoRA, and transformers gives the same words from the export.

    python examples/vila_tiny/run.py
    make vila
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]  # which has what the examples need alike

from installed import installed_by  # noqa: E402

with installed_by("make vila"):
    import photos
    import tokenizer
    from launch import StepFailed, shown
    from report import Console, Records, table
    from runs import RANKS, Runs, example_parser, run_example
    from same_losses import require_same_losses
    from vila_tiny import inputs

    from megatron_eve.config.recipe import load_recipe

STEPS = 10
CAPTIONED = ("chelsea", "coffee", "rocket")
"""The photos that the model captions at the end; of two of them it is asked about the second."""
KILL_AT = 36
LORA_ITERATIONS = 60
LORA = ("--lora-rank", 16, "--lora-alpha", 32, "--train-iters", LORA_ITERATIONS)


@dataclass(frozen=True)
class Example:
    """The steps, each of which raises `StepFailed` where something is not as it must be.

    Attributes:
        runs: the folder that the example owns.
    """

    runs: Runs

    def run(self) -> None:
        """All steps, and the table."""
        runs = self.runs
        console, step = runs.console, runs.console.step
        self._make_inputs()
        step("Stage 1", f"the projector trains on captions, as TP 2 x PP 2 on {RANKS} processes")
        self._train("stage1", 1, ("captions",), "--vision-tower", runs.output / "tower")
        blend = (0.8, "documents", 0.2, "text")
        step("Stage 2", "projector and decoder train on documents with two photos each, and on text")
        reference = self._train("reference", 2, blend, start="stage1")
        step("Stage 2 once more", f"SIGKILL at about iteration {KILL_AT}, and the same command again")
        killed = len(self._train("stage2", 2, blend, start="stage1", stop_at=KILL_AT))
        resumed = self._train("stage2", 2, blend, start="stage1", log="resumed", show=False)
        iterations = len(reference)
        require_same_losses(reference, resumed, iterations)
        console.say(f"equal at all {iterations} iterations, those after the resume included")
        step("Stage 3", "projector and decoder train on conversations about one photo and two, and on text")
        blend = (0.9, "conversations", 0.1, "chat")
        stage3 = self._train("stage3", 3, blend, start="stage2")
        step("Answers", "one process captions three photos, and tells what the second of two shows")
        learnt = self._learnt()
        answers = runs.ask_learnt("stage3", learnt, "--conv-mode", "vila_v1")
        step(
            "LoRA", "stage 3 again from stage 2's weights: adapters and projector train, the decoder does not"
        )
        lora = self._train("lora", 3, blend, *LORA, start="stage2", iterations=LORA_ITERATIONS)
        step("Export", "to transformers' own LlavaForConditionalGeneration, which answers the same questions")
        runs.tool(
            "tools/convert_checkpoint.py", "export", "export", "--source", runs.folder("stage3"), "--target",
            runs.folder("export"), "--tokenizer", runs.tokenizer, "--format", "transformers", "--dtype", "float32",
        )  # fmt: skip
        exported = runs.ask_learnt("export", learnt, "--conv-mode", "vila_v1", answers="exported")
        right = sum(said == trained for said, (_, _, trained) in zip(answers, learnt, strict=True))
        same = sum(one == other for one, other in zip(answers, exported, strict=True))
        rows = [
            ("layout", f"TP 2 with sequence parallelism x PP 2, {RANKS} processes"),
            ("language loss of stage 2", _losses(reference)),
            ("killed, resumed", f"after iteration {killed}; losses equal bit for bit"),
            ("language loss of stage 3", _losses(stage3)),
            ("the same with LoRA", _losses(lora)),
            ("answers word for word", f"{right} of {len(answers)}"),
            ("the same from transformers", f"{same} of {len(answers)}"),
            ("time", console.elapsed),
        ]
        print("\n" + table(rows))
        print(f"What the commands printed is in {shown(runs.output / 'logs')}.")
        if right < len(answers) or same < len(answers):
            raise StepFailed("an answer is not the one that the model was trained on")

    def _make_inputs(self) -> None:
        """Photos, tokenizer, the five datasets, the tower."""
        captions, runs, console = photos.load_captions(), self.runs, self.runs.console
        console.step("Photos and tokenizer", f"{len(captions)} pictures of scikit-image, 512 pieces")
        rows = photos.export(runs.data)
        sentences = [*captions.values(), *(sentence for pair in inputs.TEXT for sentence in pair)]
        tokenizer.train([*sentences, inputs.FIRST, inputs.SECOND], runs.tokenizer)
        console.step(
            "Datasets", "captions, documents, conversations with photos, text, conversations without"
        )
        for name, file, template in (
            *inputs.photo_rows(rows),
            ("text", inputs.write_sentences(runs.data / "text.jsonl"), "document"),
            ("chat", inputs.write_text(runs.data / "text.json"), "vila_v1"),
        ):
            runs.preprocess(name, file, template, show=name == "captions")
            console.say(f"-> {shown(runs.data / name)}")
        console.step("Vision tower", "CLIP's architecture with random weights, so nothing is downloaded")
        console.say(f"-> {shown(inputs.save_tower(runs.output / 'tower'))}")

    def _train(
        self,
        name: str,
        stage: int,
        blend: tuple[object, ...],
        *flags: object,
        iterations: int | None = None,
        **settings: Any,
    ) -> Records:
        """Train a stage by its recipe; `iterations` are those of the flags, if not the recipe's."""
        recipe = EXAMPLES / "vila_tiny" / f"stage{stage}.yaml"
        iterations = iterations or load_recipe(recipe).total_iterations
        return self.runs.train(name, blend, "--config", recipe, *flags, iterations=iterations, **settings)

    def _learnt(self) -> list[tuple[list[str], str, str]]:
        """Three captions, and what the first and the second of two photos show: pictures, question, answer."""
        rows = {row["id"]: row for row in json.loads((self.runs.data / "captions.json").read_text())}
        one, other = next(pair for pair in inputs.pairs(list(rows.values())) if pair[0]["id"] == CAPTIONED[0])
        asked = [([rows[photo]], inputs.ALONE, rows[photo]) for photo in CAPTIONED]
        asked += [([one, other], inputs.FIRST, one), ([one, other], inputs.SECOND, other)]
        return [
            ([row["image"] for row in pictures], text, inputs.caption_of(row))
            for pictures, text, row in asked
        ]


def _losses(records: Records) -> str:
    first, last = records[0]["lm_loss"], records[-1]["lm_loss"]
    return f"{first:.4f} at the start, {last:.4f} at the end"


def main() -> int:
    """Read the command line and run; returns the exit status."""
    flags = example_parser(__doc__, "vila").parse_args()
    runs = Runs(flags.output, Console(STEPS), inputs.DATASET_FLAGS)
    opening = (
        "VILA at toy size: photos -> datasets -> three stages, a kill, a resume -> answers -> LoRA -> transformers\n"
        "Ten minutes of CPU time."
    )
    return run_example("vila", runs, opening, Example(runs).run)


if __name__ == "__main__":
    sys.exit(main())
