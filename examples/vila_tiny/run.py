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
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]  # which has what both examples need

NEEDED = "is not installed: make vila installs it, or pip install '.[quickstart]'"

try:
    import photos
    import tokenizer
    from folder import NotOurs, check, prepare
    from launch import ROOT, Command, StepFailed, follow, module, read_records, shown, words
    from report import Console, table
    from same_losses import require_same_losses
    from vila_tiny import inputs

    from megatron_eve.config.presets import PRESETS
    from megatron_eve.config.recipe import load_recipe
    from megatron_eve.runtime.command_line import command_parser_of
except ModuleNotFoundError as error:
    print(f"error: {error.name} {NEEDED}", file=sys.stderr)
    sys.exit(2)

RANKS, STEPS = 4, 10
LAYOUT = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--sequence-parallel")
CAPTIONED = ("chelsea", "coffee", "rocket")
"""The photos that the model captions at the end; of two of them it is asked about the second."""
KILL_AT = 36
LORA = ("--lora-rank", 16, "--lora-alpha", 32)
LORA_ITERATIONS = 60


@dataclass(frozen=True)
class Example:
    """The steps, each a method that raises `StepFailed` where something is not as it must be.

    Attributes:
        output: the folder that the example owns.
        console: gets the progress.
    """

    output: Path
    console: Console

    @property
    def _data(self) -> Path:
        return self.output / "data"

    @property
    def _tokenizer(self) -> Path:
        return self._data / "tokenizer.model"

    def run(self) -> None:
        """All steps, and the table."""
        step, say = self.console.step, self.console.say
        prepare(self.output)
        self.make_inputs()
        step("Stage 1", f"the projector trains on captions, as TP 2 x PP 2 on {RANKS} processes")
        tower = ("--vision-tower", self.output / "tower")
        self.train("stage1", 1, ("captions",), *tower)
        blend = (0.8, "documents", 0.2, "text")
        step("Stage 2", "projector and decoder train on documents with two photos each, and on text")
        self.train("reference", 2, blend, *self._start("stage1"))
        step("Stage 2 once more", f"SIGKILL at about iteration {KILL_AT}, and the same command again")
        killed = self.train("stage2", 2, blend, *self._start("stage1"), stop_at=KILL_AT)
        resumed = self.train("stage2", 2, blend, *self._start("stage1"), log="resumed")
        reference, records = (
            read_records(self.output / name / "losses.jsonl") for name in ("reference", "stage2")
        )
        require_same_losses(reference, records, resumed)
        say(f"equal at all {resumed} iterations, those after the resume included")
        step("Stage 3", "projector and decoder train on conversations about one photo and two, and on text")
        blend = (0.9, "conversations", 0.1, "chat")
        self.train("stage3", 3, blend, *self._start("stage2"))
        step("Answers", "one process captions three photos, and tells what the second of two shows")
        answers = self.ask(self.output / "stage3", "answers")
        step(
            "LoRA", "stage 3 again from stage 2's weights: adapters and projector train, the decoder does not"
        )
        self.train("lora", 3, blend, *self._start("stage2"), *LORA, iterations=LORA_ITERATIONS)
        step("Export", "to transformers' own LlavaForConditionalGeneration, which answers the same questions")
        self.export()
        exported = self.ask(self.output / "export", "exported")
        right = sum(said == trained for said, trained in answers)
        same = sum(one == other for one, other in zip(answers, exported, strict=True))
        lora = read_records(self.output / "lora" / "losses.jsonl")
        rows = [
            ("layout", f"TP 2 with sequence parallelism x PP 2, {RANKS} processes"),
            ("language loss of stage 2", self._losses(reference)),
            ("killed, resumed", f"after iteration {killed}; losses equal bit for bit"),
            ("language loss of stage 3", self._losses(read_records(self.output / "stage3" / "losses.jsonl"))),
            ("the same with LoRA", self._losses(lora)),
            ("answers word for word", f"{right} of {len(answers)}"),
            ("the same from transformers", f"{same} of {len(answers)}"),
            ("time", self.console.elapsed),
        ]
        print("\n" + table(rows))
        print(f"What the commands printed is in {shown(self.output / 'logs')}.")
        if right < len(answers) or same < len(answers):
            raise StepFailed("an answer is not the one that the model was trained on")

    def make_inputs(self) -> None:
        """Photos, tokenizer, the five datasets, the tower."""
        captions, data, vision = photos.load_captions(), self._data, PRESETS["vila_tiny"].vision
        self.console.step("Photos and tokenizer", f"{len(captions)} pictures of scikit-image, 512 pieces")
        rows = photos.export(data)
        sentences = [*captions.values(), *(sentence for pair in inputs.TEXT for sentence in pair)]
        tokenizer.train([*sentences, inputs.FIRST, inputs.SECOND], self._tokenizer)
        self.console.step("Datasets", "captions, documents, text, conversations with photos and without")
        text = inputs.write_text(data / "text.json")
        self.preprocess("captions", rows, "plain")
        self.preprocess("documents", inputs.write_documents(rows, data / "docs_shard_0_v3.jsonl"), "document")
        self.preprocess("text", inputs.write_sentences(data / "text.jsonl"), "document")
        self.preprocess(
            "conversations", inputs.write_conversations(rows, data / "conversations.json"), "vila_v1"
        )
        self.preprocess("chat", text, "vila_v1")
        self.console.step("Vision tower", "CLIP's architecture with random weights, so nothing is downloaded")
        self.console.say(f"-> {shown(inputs.save_tower(self.output / 'tower', vision))}")

    def preprocess(self, name: str, rows: Path, template: str) -> None:
        """Make a dataset of rows."""
        vision = PRESETS["vila_tiny"].vision
        arguments = words(
            "--family", "vila", "--input", rows, "--image-root", self._data / "images", "--tokenizer-model",
            self._tokenizer, "--output-prefix", self._data / name, "--template", template, "--image-size",
            vision.image_size, "--vision-patch-size", vision.vision_patch_size,
        )  # fmt: skip
        if name == "captions":
            self._announce("python tools/preprocess_data.py", arguments)
        command = [sys.executable, "tools/preprocess_data.py", *arguments]
        with Command(command, self._log(f"preprocess-{name}")) as running:
            running.wait()
        self.console.say(f"-> {shown(self._data / name)}")

    def train(
        self,
        name: str,
        stage: int,
        blend: tuple[object, ...],
        *flags: object,
        log: str | None = None,
        stop_at: int | None = None,
        iterations: int | None = None,
    ) -> int:
        """Train on four ranks, from the latest checkpoint of the run's folder if it holds one.

        Args:
            name: of the run, so of its folder.
            stage: and so the recipe.
            blend: datasets by name, or weights and names in turns.
            flags: further ones.
            log: name for the log; by default the run's.
            stop_at: kill all its processes with SIGKILL once this iteration is reported.
            iterations: instead of the recipe's.

        Returns:
            The last iteration that was reported.
        """
        folder, recipe, iteration = self.output / name, EXAMPLES / "vila_tiny" / f"stage{stage}.yaml", 0
        iterations = iterations or load_recipe(recipe).total_iterations
        data = [self._data / word if isinstance(word, str) else word for word in blend]
        arguments = words(
            "--config", recipe, *LAYOUT, "--train-iters", iterations, "--data-path", *data, "--tokenizer-model",
            self._tokenizer, "--save", folder, "--load", folder, *flags,
        )  # fmt: skip
        if log is None:  # a resume is the same command again
            self._announce(f"torchrun --nproc-per-node {RANKS} -m megatron_eve.pretrain", arguments)
        with Command(module(RANKS, "megatron_eve.pretrain", *arguments), self._log(log or name)) as running:
            for record in follow(running, folder / "losses.jsonl"):
                iteration = record["iteration"]
                if iteration == 1 or iteration % 20 == 0:
                    self.console.training(record, iterations)
                if stop_at is not None and iteration >= stop_at:
                    killed = running.kill()
                    iteration = int(read_records(folder / "losses.jsonl")[-1]["iteration"])
                    self.console.say(f"SIGKILL to all {killed} processes after iteration {iteration}")
                    return iteration
            running.wait()
        return iteration

    def ask(self, model: Path, name: str) -> list[tuple[str, str]]:
        """Ask for three captions, and what the first and the second of two photos show, in both orders.

        Args:
            model: a checkpoint or an export.
            name: of the answers, and of the log.

        Returns:
            For each question what the model says, and what it was trained to say.
        """
        captions = photos.load_captions()
        rows = {
            row["id"]: row for row in json.loads((self._data / "captions.json").read_text(encoding="utf-8"))
        }
        one, other = next(pair for pair in inputs.pairs(list(rows.values())) if pair[0]["id"] == CAPTIONED[0])
        asked = [([rows[photo]], inputs.ALONE, photo) for photo in CAPTIONED]
        asked += [([one, other], inputs.FIRST, one["id"]), ([one, other], inputs.SECOND, other["id"])]
        questions, answers = self.output / "questions.jsonl", self.output / f"{name}.jsonl"
        lines = [
            {"question_id": str(i), "image": [row["image"] for row in pictures], "text": text}
            for i, (pictures, text, _) in enumerate(asked)
        ]
        questions.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        arguments = words(
            "--model-path", model, "--conv-mode", "vila_v1", "--question-file", questions, "--image-folder",
            self._data / "images", "--answers-file", answers, "--max-new-tokens", 64,
        )  # fmt: skip
        self._announce("python tools/generate.py", arguments)
        with Command([sys.executable, "tools/generate.py", *arguments], self._log(name)) as running:
            running.wait()
        given = {row["question_id"]: row["text"] for row in read_records(answers)}
        found = [(given[str(i)], captions[photo]) for i, (_, _, photo) in enumerate(asked)]
        for (pictures, _, _), (said, trained) in zip(asked, found, strict=True):
            note = "word for word" if said == trained else f"but it was trained on: {trained}"
            self.console.say(f"{', '.join(row['image'] for row in pictures)}: {said}", f"    {note}")
        return found

    def export(self) -> None:
        """The folder that transformers loads without code of ours."""
        arguments = words(
            "export", "--source", self.output / "stage3", "--target", self.output / "export", "--tokenizer",
            self._tokenizer, "--format", "transformers", "--dtype", "float32",
        )  # fmt: skip
        self._announce("python tools/convert_checkpoint.py", arguments)
        with Command(
            [sys.executable, "tools/convert_checkpoint.py", *arguments], self._log("export")
        ) as running:
            running.wait()

    def _start(self, run: str) -> tuple[object, ...]:
        return "--pretrained-checkpoint", self.output / run

    @staticmethod
    def _losses(records: list[dict[str, Any]]) -> str:
        first, last = records[0]["lm_loss"], records[-1]["lm_loss"]
        return f"{first:.4f} at the start, {last:.4f} at the end"

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
        default=ROOT / "vila",
        metavar="DIR",
        help="folder for all that is made (default: vila)",
    )
    output = parser.parse_args().output.resolve()
    try:
        check(output)
    except NotOurs as found:
        print(f"error: {found}: move it away, or choose another folder with --output", file=sys.stderr)
        return 2
    print(
        "VILA at toy size: photos -> datasets -> three stages, a kill, a resume -> answers -> LoRA -> transformers\n"
        "Ten minutes of CPU time. The commands that it shows can be typed by hand, after\n"
        f"export PATH={Path(sys.executable).parent}:$PATH"
    )
    try:
        Example(output, Console(STEPS)).run()
    except StepFailed as failure:
        print(f"\nvila failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nvila stopped, and with it all that it had started", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
