"""Does a language model forget its text while it learns pictures? Stages 2 and 3 at toy size, with text and without.

A language model learns toy English and sums in words, then VILA's stages 1 to 3 on scikit-image's photos. Stages 2 and
3 run four times: full tuning and LoRA, each with a share of text in the blend (the toy English, not the sums) and
without. Text that no run has seen is measured throughout.

    python examples/vila_tiny/text_experiment.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]

from installed import installed_by  # noqa: E402

with installed_by("make vila", "matplotlib"):
    import photos
    import tokenizer
    from launch import read_records, shown
    from report import Console, table
    from runs import Runs, example_parser, run_example
    from vila_tiny import grammar, inputs

    from megatron_eve.runtime.command_line import whole_number

TEXT_SHARE = 0.2
LORA = ("--lora-rank", 16, "--lora-alpha", 32)
HELD_OUT = ("held_out_sentences", "held_out_sums")
PHOTOS, PHOTO_CONVERSATIONS = "photos", 12
"""A dataset of conversations that stage 3 trains on, so not a held-out one: it tells what each variant has learnt."""
TRAIN_TEXTS, HELD_OUT_TEXTS = 2000, 64


@dataclass(frozen=True)
class Variant:
    """One way to train stages 2 and 3.

    Attributes:
        name: of its runs.
        title: in table and plot.
        text: is there text in the blends?
        lora: adapters in the decoder's place.
    """

    name: str
    title: str
    text: bool
    lora: bool


VARIANTS = (
    Variant("full", "full tuning, no text", False, False),
    Variant("full_text", "full tuning, 20 % text", True, False),
    Variant("lora", "LoRA, no text", False, True),
    Variant("lora_text", "LoRA, 20 % text", True, True),
)


@dataclass(frozen=True)
class Curve:
    """Held-out losses of a variant over stages 2 and 3.

    Attributes:
        iterations: counted through both stages; 0 is the end of stage 1.
        losses: by dataset, one for each of these.
    """

    iterations: list[int]
    losses: dict[str, list[float]]


@dataclass(frozen=True)
class Experiment:
    """The steps.

    Attributes:
        runs: the folder.
        pretraining, iterations: of the language model, and of stage 2 and of stage 3 each.
        interval: iterations between measurements in stages 2 and 3.
    """

    runs: Runs
    pretraining: int
    iterations: int
    interval: int

    def run(self) -> dict[str, Curve]:
        """All runs; returns the curves by the name of the variant."""
        step, iterations = self.runs.console.step, self.iterations
        self._make_inputs()
        step("Language model", f"{self.pretraining} iterations on toy English and sums, without a picture")
        self._train("language", 2, (0.5, "sentences", 0.5, "sums"), self.pretraining, None, 32, show=True)
        step("Stage 1", "the projector trains on captions; the language model is frozen")
        tower = ("--vision-tower", self.runs.output / "tower")
        self._train("stage1", 1, ("captions",), iterations, "language", 8, *tower)
        curves = {}
        for variant in VARIANTS:
            step(variant.title, f"stages 2 and 3, {iterations} iterations each")
            lora = LORA if variant.lora else ()
            names = f"{variant.name}_stage2", f"{variant.name}_stage3"
            for stage, (name, start, data) in enumerate(
                ((names[0], "stage1", "documents"), (names[1], names[0], "conversations")), start=2
            ):
                blend = (1 - TEXT_SHARE, data, TEXT_SHARE, "sentences") if variant.text else (data,)
                self._train(name, stage, blend, iterations, start, 8, *lora)
            curves[variant.name] = self._curve(names)
        return curves

    def _make_inputs(self) -> None:
        """Photos, texts, tokenizer, datasets, tower."""
        runs, captions = self.runs, photos.load_captions()
        runs.console.step("Data", "photos of scikit-image with captions, toy English, sums in words")
        rows = photos.export(runs.data)
        texts = [*captions.values(), inputs.ALONE, inputs.FIRST, inputs.SECOND]
        made = {}
        for name in grammar.TEXTS:
            for prefix, count, seed in ((name, TRAIN_TEXTS, 0), (f"held_out_{name}", HELD_OUT_TEXTS, 1)):
                made[prefix] = runs.data / f"{prefix}.jsonl"
                texts += grammar.write(name, count, seed, made[prefix])
        tokenizer.train(texts, runs.tokenizer)
        for prefix, path in made.items():
            runs.preprocess(prefix, path, "document")
        for name, path, template in inputs.photo_rows(rows):
            runs.preprocess(name, path, template)
        conversations = json.loads((runs.data / "conversations.json").read_text(encoding="utf-8"))
        some = json.dumps(conversations[:PHOTO_CONVERSATIONS])
        (runs.data / "photos.json").write_text(some, encoding="utf-8")
        runs.preprocess(PHOTOS, runs.data / "photos.json", "vila_v1")
        inputs.save_tower(runs.output / "tower")

    def _train(
        self,
        name: str,
        stage: int,
        blend: Sequence[object],
        iterations: int,
        start: str | None,
        batch: int,
        *flags: object,
        show: bool = False,
    ) -> None:
        measured = [self.runs.data / prefix for prefix in (*HELD_OUT, PHOTOS)]
        rate, interval = (1e-3 if stage == 1 else 3e-3), (self.interval if start else iterations)
        self.runs.train(
            name, blend, "--preset", inputs.PRESET, "--stage", stage, "--train-iters", iterations,
            "--global-batch-size", batch, "--seq-length", 1024, "--lr", rate, "--lr-warmup-fraction", 0.1,
            "--adam-beta2", 0.9, "--save-interval", iterations, "--valid-data-path", *measured,
            "--eval-interval", interval, *flags, start=start, show=show,
        )  # fmt: skip

    def _curve(self, names: tuple[str, str]) -> Curve:
        found: dict[str, dict[int, float]] = {prefix: {} for prefix in (*HELD_OUT, PHOTOS)}
        for name, before in (("stage1", -self.iterations), (names[0], 0), (names[1], self.iterations)):
            for record in read_records(self.runs.folder(name) / "valid_losses.jsonl"):
                iteration = int(record["iteration"]) + before
                if iteration >= 0:
                    found[record["dataset"]][iteration] = float(record["lm_loss"])
        return Curve(
            iterations=sorted(found[HELD_OUT[0]]),
            losses={prefix: [some[i] for i in sorted(some)] for prefix, some in found.items()},
        )


def draw(curves: dict[str, Curve], iterations: int, path: Path) -> None:
    """Draw the held-out losses of all variants into a PNG file, a panel for each dataset."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharex=True)
    titles = ("toy English (in the text share)", "sums in words (not in the text share)")
    for axes, dataset, title in zip(panels, HELD_OUT, titles, strict=True):
        for variant in VARIANTS:
            curve = curves[variant.name]
            axes.plot(
                curve.iterations,
                curve.losses[dataset],
                label=variant.title,
                color="#1f618d" if variant.lora else "#c0392b",
                linestyle="-" if variant.text else "--",
                marker="o",
                markersize=3,
            )
        axes.axvline(iterations, color="#999999", linestyle=":")
        axes.set(title=title, xlabel="iteration (stage 2 | stage 3)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out language loss")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def rows_of(curves: dict[str, Curve], iterations: int) -> list[tuple[str, str]]:
    """Rows for the closing table: losses after stages 1, 2 and 3 on each dataset."""
    rows = [("losses after stages 1, 2, 3", "toy English          sums in words        photos (trained on)")]
    for variant in VARIANTS:
        curve = curves[variant.name]
        ends = [curve.iterations.index(iterations * stage) for stage in range(3)]
        values = ["  ".join(f"{losses[end]:5.3f}" for end in ends) for losses in curve.losses.values()]
        rows.append((variant.title, "  ".join(values)))
    return rows


def main() -> int:
    """Read the command line and run; returns the exit status."""
    parser = example_parser(__doc__, "vila_text")
    for flag, default, what in (
        ("--pretraining", 250, "iterations of the language model"),
        ("--iterations", 40, "iterations of each stage"),
        ("--interval", 10, "iterations between two measurements; a divisor of --iterations"),
    ):
        parser.add_argument(flag, type=whole_number(1), default=default, metavar="N", help=what)
    flags = parser.parse_args()
    if flags.iterations % flags.interval:
        parser.error(f"--interval {flags.interval}: does not divide --iterations {flags.iterations}")

    runs = Runs(flags.output, Console(3 + len(VARIANTS)), inputs.DATASET_FLAGS, ranks=1, subfolder="runs")

    def run() -> None:
        curves = Experiment(runs, flags.pretraining, flags.iterations, flags.interval).run()
        picture, numbers = runs.output / "result.png", runs.output / "result.json"
        draw(curves, flags.iterations, picture)
        found = {name: curve.__dict__ for name, curve in curves.items()}
        numbers.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print("\n" + table(rows_of(curves, flags.iterations)))
        print(f"The curves are in {shown(picture)} and {numbers.name} beside it.   {runs.console.elapsed}")

    opening = "A language model learns text, and then pictures in four ways. About ten minutes on two cores."
    return run_example("the experiment", runs, opening, run)


if __name__ == "__main__":
    sys.exit(main())
