"""Does a language model lose its text while it learns pictures? EVE v2 at toy size: shared weights, experts, text.

A language model learns toy English and sums in words. Then it learns captions of scikit-image's photos in two halves of
as many iterations: with shared weights, all of them train in both; with experts, stage 1 trains the experts and the
patch embedding, and stage 2 all. Where all weights train, they do so without text and with two shares of toy English in
the blend (never the sums). Text that no run has seen is measured after each half.

    python examples/eve2_tiny/text_experiment.py
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]

from installed import installed_by  # noqa: E402

with installed_by("make quickstart"):
    import photos
    import tokenizer
    from launch import StepFailed, read_records, shown
    from report import Console, table
    from runs import Runs, example_parser, run_example
    from vila_tiny import grammar

    from megatron_eve.config.presets import PRESETS
    from megatron_eve.runtime.command_line import whole_number

PRESET = "eve2_tiny"
DATASET_FLAGS = ("--family", "eve2", "--max-image-side", PRESETS[PRESET].vision.max_image_side)
TEXT_SHARES = (0.0, 0.2, 0.5)
"""Shares of the samples of a blend that are text."""
SHARED, EXPERTS = "shared weights", "experts"
HELD_OUT = ("held_out_sentences", "held_out_sums")
CAPTIONS, PHOTOS = "captions", "photos"
"""The captions as a dataset to train on, and the same again to measure: it tells what each variant has learnt."""
TRAIN_TEXTS, HELD_OUT_TEXTS = 2000, 64

Losses = dict[str, float]
"""Losses by dataset: both kinds of held-out text, and the photos' captions, which are trained on."""


@dataclass(frozen=True)
class Variant:
    """One way to learn pictures.

    Attributes:
        decoder: `SHARED` or `EXPERTS`.
        text: share of text in the blend where all weights train.
    """

    decoder: str
    text: float

    @property
    def title(self) -> str:
        """In the table."""
        return f"{self.decoder}, {f'{self.text:.0%} text' if self.text else 'no text'}"

    @property
    def name(self) -> str:
        """Of its runs."""
        return f"{self.decoder.split()[0]}_{100 * self.text:.0f}"


VARIANTS = tuple(Variant(decoder, share) for decoder in (SHARED, EXPERTS) for share in TEXT_SHARES)


@dataclass(frozen=True)
class Experiment:
    """The steps.

    Attributes:
        runs: the folder.
        seeds: how often all of it runs, each time with other initial weights and another order.
        pretraining, iterations: of the language model, and of each half.
        rate: learning rate of both halves.
    """

    runs: Runs
    seeds: int
    pretraining: int
    iterations: int
    rate: float

    def run(self) -> dict[str, list[list[Losses]]]:
        """All runs; returns for each variant and seed the losses before, after one half and after both."""
        self._make_inputs()
        found: dict[str, list[list[Losses]]] = {variant.title: [] for variant in VARIANTS}
        for seed in range(1, self.seeds + 1):
            self.runs.console.step(
                f"Seed {seed}", f"a language model, and {len(VARIANTS)} ways to learn captions"
            )
            for title, losses in self._run_seed(seed).items():
                found[title].append(losses)
        return found

    def _run_seed(self, seed: int) -> dict[str, list[Losses]]:
        language = self._train("language", seed, (0.5, "sentences", 0.5, "sums"), None, self.pretraining)[-1]
        (stage1,) = self._train("experts_1", seed, (CAPTIONS,), "language", self.iterations, stage=1)
        for name in HELD_OUT:
            if stage1[name] != language[name]:
                raise StepFailed(
                    f"stage 1, in which experts train alone, changed the loss of {name} from {language[name]} to "
                    f"{stage1[name]}"
                )
        found = {}
        for variant in VARIANTS:
            text = variant.text
            blend = (1 - text, CAPTIONS, text, "sentences") if text else (CAPTIONS,)
            if variant.decoder == SHARED:
                halves = self._train(variant.name, seed, blend, "language", 2 * self.iterations)
            else:
                halves = [stage1, *self._train(variant.name, seed, blend, "experts_1", self.iterations)]
            found[variant.title] = [language, *halves]
        return found

    def _make_inputs(self) -> None:
        """Photos, texts, tokenizer, datasets."""
        runs, captions = self.runs, photos.load_captions()
        runs.console.step("Data", "photos of scikit-image with captions, toy English, sums in words")
        rows = photos.export(runs.data)
        texts, made = [*captions.values()], {}
        for name in grammar.TEXTS:
            for prefix, count, seed in ((name, TRAIN_TEXTS, 0), (f"held_out_{name}", HELD_OUT_TEXTS, 1)):
                made[prefix] = runs.data / f"{prefix}.jsonl"
                texts += grammar.write(name, count, seed, made[prefix])
        tokenizer.train(texts, runs.tokenizer)
        for prefix, path in made.items():
            runs.preprocess(prefix, path, "document")
        for name in (CAPTIONS, PHOTOS):
            runs.preprocess(name, rows, "eve2_plain")

    def _train(
        self,
        name: str,
        seed: int,
        blend: Sequence[object],
        start: str | None,
        iterations: int,
        stage: int = 2,
    ) -> list[Losses]:
        """One run, and the losses at the end of each half; only those whose names say so have experts."""
        pretraining = start is None
        experts = "--modality-experts" if name.startswith(EXPERTS) else "--no-modality-experts"
        folder, interval = f"{name}_seed{seed}", iterations if pretraining else self.iterations
        self.runs.train(
            folder, blend, "--preset", PRESET, experts, "--stage", stage, "--train-iters", iterations, "--seed", seed,
            "--global-batch-size", 12, "--seq-length", 1024, "--lr", 3e-3 if pretraining else self.rate,
            "--lr-warmup-fraction", 0.1, "--adam-beta2", 0.95, "--save-interval", iterations,
            "--eval-interval", interval,
            "--valid-data-path", *(self.runs.data / prefix for prefix in (*HELD_OUT, PHOTOS)),
            start=None if start is None else f"{start}_seed{seed}", show=pretraining and seed == 1,
        )  # fmt: skip
        found: dict[int, Losses] = {}
        for record in read_records(self.runs.folder(folder) / "valid_losses.jsonl"):
            found.setdefault(int(record["iteration"]), {})[record["dataset"]] = float(record["lm_loss"])
        return [found[iteration] for iteration in sorted(found)]


def rows_of(found: dict[str, list[list[Losses]]]) -> list[tuple[str, str]]:
    """Rows for the closing table: losses before, after one half and after both, means over seeds with their range."""
    rows = [("losses before, after one half, after both", "")]
    for title, seeds in found.items():
        for dataset in (*HELD_OUT, PHOTOS):
            cells = []
            for moment in zip(*seeds, strict=True):
                values = [losses[dataset] for losses in moment]
                cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} - {max(values):.3f})")
            rows.append((f"{title}: {dataset}", "   ".join(cells)))
    return rows


def main() -> int:
    """Read the command line and run; returns the exit status."""
    parser = example_parser(__doc__, "eve2_text")
    for flag, default, what in (
        ("--seeds", 1, "how often all of it runs, with other initial weights"),
        ("--pretraining", 250, "iterations of the language model"),
        ("--iterations", 40, "iterations of each half"),
    ):
        parser.add_argument(flag, type=whole_number(1), default=default, metavar="N", help=what)
    parser.add_argument("--rate", type=float, default=1e-3, metavar="LR", help="learning rate on captions")
    flags = parser.parse_args()
    runs = Runs(flags.output, Console(1 + flags.seeds), DATASET_FLAGS, ranks=1, subfolder="runs")

    def run() -> None:
        found = Experiment(runs, flags.seeds, flags.pretraining, flags.iterations, flags.rate).run()
        numbers = runs.output / "result.json"
        numbers.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print("\n" + table(rows_of(found)))
        runs.console.say(
            "stage 1 of the experts left all held-out losses of text as they were, to the last bit"
        )
        print(f"All of it is in {shown(numbers)}.   {runs.console.elapsed}")

    opening = "A language model learns text, and then captions in six ways. About seven minutes on two cores."
    return run_example("the experiment", runs, opening, run)


if __name__ == "__main__":
    sys.exit(main())
