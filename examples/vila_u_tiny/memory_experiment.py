"""Has a model that redraws its photos learnt more than these by heart? VILA-U at toy size, measured.

On the photos of run.py: do drawings follow their sentences when two of these are exchanged, and does a caption
break when its picture is replaced by a grey one? Then on made pictures of one coloured shape each, with several seeds
of tower and model: are combinations of colour and shape drawn and named that were in no picture trained on?

    python examples/vila_u_tiny/memory_experiment.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]

from installed import installed_by  # noqa: E402

with installed_by("make vila-u"):
    import photos
    from launch import StepFailed, shown
    from PIL import Image
    from report import Console, table
    from runs import Question, Runs, example_parser, run_example
    from vila_u_tiny import inputs, placed_shapes
    from vila_u_tiny.drawings import Codes, code_sums, draw, equal_share, stored_codes
    from vila_u_tiny.placed_shapes import PlacedShape, Score
    from vila_u_tiny.random_tower import SIDE, save_toy_tower

    from megatron_eve.runtime.command_line import whole_number

RECIPE = EXAMPLES / "vila_u_tiny" / "pretrain.yaml"
GREY = "grey.png"
MOST_SHARED = 0.5
"""Share of codes that a drawing may have in common with the one that its exchanged sentence gives."""
SHAPES_FLAGS = ("--lr", 3e-3, "--adam-beta2", 0.98)
"""Of the trainings on made pictures: at the recipe's rate drawings have not followed colours after 300 iterations."""
SENTENCE_COPIES = 10
"""How often the tokenizer reads the sentences of made pictures, beside captions that fill its vocabulary."""


@dataclass(frozen=True)
class PhotoResult:
    """What comes out on photos.

    Attributes:
        follow: share of drawings that go with their sentence, code for code, when two sentences are exchanged.
        shared: the largest share of codes that a drawing has in common with the one of the exchanged sentence.
        captions: photos that are captioned word for word, of `asked`.
        with_grey: captions that a grey picture in the photo's place gives, too.
        asked: photos.
    """

    follow: float
    shared: float
    captions: int
    with_grey: int
    asked: int


@dataclass(frozen=True)
class ShapeResult:
    """What comes out on made pictures with one seed, trained on and held out.

    Attributes:
        drawn, named: scores by "trained on" and "held out".
        codes: mean share of a drawing's codes that are those of the true picture.
        losses: language and visual loss at the end.
    """

    drawn: dict[str, Score]
    named: dict[str, Score]
    codes: dict[str, float]
    losses: tuple[float, float]


@dataclass(frozen=True)
class Experiment:
    """The steps.

    Attributes:
        runs: the folder.
        iterations: of a training on made pictures.
        seeds: how many there are of these.
        mixing: of their towers, see `save_toy_tower`.
    """

    runs: Runs
    iterations: int
    seeds: int
    mixing: float

    def run(self) -> tuple[PhotoResult, list[ShapeResult]]:
        """All steps; returns what comes out on photos, and on made pictures by seed."""
        step = self.runs.console.step
        step("Photos", "one model learns to caption and to redraw them")
        shown_photos, pictures = inputs.export_photos(self.runs), placed_shapes.save_pictures(self._images)
        Image.new("RGB", (SIDE, SIDE), (128, 128, 128)).save(self._images / GREY)
        sentences = [sentence for _, _, sentence in pictures] * SENTENCE_COPIES
        inputs.train_tokenizer(self.runs, [*photos.load_captions().values(), *sentences])
        tower = save_toy_tower(self.runs.folder("tower"))
        inputs.make_dataset(self.runs, "photos", shown_photos, tower)
        self._train("photos", tower)
        result, results = self._ask_photos(shown_photos), []
        for seed in range(self.seeds):
            step("Made pictures", f"tower and model of seed {seed}")
            results.append(self._shapes(seed, pictures))
        return result, results

    @property
    def _images(self) -> Path:
        return self.runs.data / "images"

    def _train(self, name: str, tower: Path, *flags: object) -> tuple[float, float]:
        """Train on the dataset of the run's name by one process; returns both losses of the last iteration."""
        records = self.runs.train(name, (name,), "--config", RECIPE, "--vision-tokenizer", tower, *flags)
        return records[-1]["lm_loss"], records[-1]["visual_loss"]

    def _ask_photos(self, shown_photos: Sequence[inputs.Shown]) -> PhotoResult:
        sentences = [sentence for _, _, sentence in shown_photos]
        pairs = len(sentences) // 2 * 2
        swapped = [sentences[number ^ 1] for number in range(pairs)]
        before = draw(self.runs, "photos", sentences[:pairs], "before")
        after = draw(self.runs, "photos", swapped, "after")
        follow = [equal_share(after[number], before[number ^ 1]) == 1 for number in range(pairs)]
        shared = [equal_share(one, other) for one, other in zip(before, after, strict=True)]
        questions = [(name, [file], inputs.ASKED) for name, file, _ in shown_photos]
        answers = self._ask("photos", [*questions, (GREY, [GREY], inputs.ASKED)])
        return PhotoResult(
            follow=sum(follow) / pairs,
            shared=max(shared),
            captions=sum(answers[name] == sentence for name, _, sentence in shown_photos),
            with_grey=sentences.count(answers[GREY]),
            asked=len(sentences),
        )

    def _shapes(self, seed: int, pictures: Sequence[inputs.Shown]) -> ShapeResult:
        name, everything = f"shapes_{seed}", placed_shapes.ALL
        tower = save_toy_tower(self.runs.folder(f"tower_{seed}"), seed, self.mixing)
        trained = [picture for picture, one in zip(pictures, everything, strict=True) if not one.held_out]
        inputs.make_dataset(self.runs, name, trained, tower)
        inputs.make_dataset(self.runs, f"all_{seed}", pictures, tower)  # for the codes of those held out
        losses = self._train(name, tower, "--seed", seed, "--train-iters", self.iterations, *SHAPES_FLAGS)
        drawn = draw(self.runs, name, [one.sentence for one in everything], name)
        answers = self._ask(name, [(file, [file], inputs.ASKED) for _, file, _ in pictures])
        true = stored_codes(self.runs.data / f"all_{seed}", range(len(everything)))
        sums = dict(zip(everything, code_sums(tower, true), strict=True))
        seen = [
            placed_shapes.nearest_combination(some, sums, one.place)
            for one, some in zip(everything, code_sums(tower, drawn), strict=True)
        ]
        named = [placed_shapes.named(answers[file]) for _, file, _ in pictures]
        return ShapeResult(
            drawn=_scores(everything, seen),
            named=_scores(everything, named),
            codes=_mean_equal(everything, drawn, true),
            losses=losses,
        )

    def _ask(self, name: str, questions: Sequence[Question]) -> dict[str, str]:
        flags = ("--conv-mode", inputs.TEMPLATE, "--max-new-tokens", 64, "--batch-size", 32)
        return self.runs.ask(name, questions, *flags, answers=f"answers-{name}")


def _scores(everything: Sequence[PlacedShape], found: Sequence[tuple[str, str]]) -> dict[str, Score]:
    pairs = list(zip(everything, found, strict=True))
    return {
        kind: placed_shapes.score([pair for pair in pairs if pair[0].held_out == held_out])
        for kind, held_out in (("trained on", False), ("held out", True))
    }


def _mean_equal(
    everything: Sequence[PlacedShape], drawn: Sequence[Codes], true: Sequence[Codes]
) -> dict[str, float]:
    shares: dict[str, list[float]] = {"trained on": [], "held out": []}
    for one, mine, theirs in zip(everything, drawn, true, strict=True):
        shares["held out" if one.held_out else "trained on"].append(equal_share(mine, theirs))
    return {kind: sum(some) / len(some) for kind, some in shares.items()}


def check_photos(result: PhotoResult) -> None:
    """Check that drawings follow their sentences, and captions their pictures.

    Raises:
        StepFailed: they do not; the message is one sentence.
    """
    if result.follow < 1:
        raise StepFailed(f"only {100 * result.follow:.0f} % of the drawings follow their exchanged sentences")
    if result.shared > MOST_SHARED:
        raise StepFailed(
            f"a drawing shares {100 * result.shared:.0f} % of its codes with that of another sentence"
        )
    if 2 * result.captions < result.asked or result.with_grey > 1:
        raise StepFailed(
            f"{result.captions} of {result.asked} captions are right, and {result.with_grey} with a grey picture"
        )


def rows_of(photo: PhotoResult, results: Sequence[ShapeResult]) -> list[tuple[str, str]]:
    """Rows for the closing table."""
    rows = [
        ("drawings that follow exchanged sentences", f"{100 * photo.follow:.0f} %"),
        ("codes shared with the other's, at most", f"{100 * photo.shared:.0f} %"),
        ("captions word for word", f"{photo.captions} of {photo.asked}"),
        ("the same with a grey picture", f"{photo.with_grey} of {photo.asked}"),
        ("made pictures, right in %", "colour  shape   both   (chance 25, 25, 6)"),
    ]
    for seed, result in enumerate(results):
        for title, scores in (("drawn", result.drawn), ("named", result.named)):
            for kind, one in scores.items():
                shares = "".join(f"{100 * share:6.0f}  " for share in (one.colour, one.shape, one.both))
                more = f" {100 * result.codes[kind]:.0f} % of the codes" if title == "drawn" else ""
                rows.append((f"seed {seed}: {title}, {kind}", shares + more))
    return rows


def main() -> int:
    """Read the command line and run; returns the exit status."""
    parser = example_parser(__doc__, "vila_u_memory")
    for flag, default, what in (
        ("--iterations", 500, "iterations of each training on made pictures"),
        ("--seeds", 3, "trainings on made pictures, each with a tower and a model of its own"),
    ):
        parser.add_argument(flag, type=whole_number(1), default=default, metavar="N", help=what)
    parser.add_argument(
        "--mixing",
        type=float,
        default=0.1,
        metavar="F",
        help="factor on what a layer of their towers adds; 1: codes tell of the whole picture (default: %(default)s)",
    )
    flags = parser.parse_args()
    runs = Runs(flags.output, Console(1 + flags.seeds), inputs.DATASET_FLAGS, ranks=1, subfolder="runs")

    def run() -> None:
        photo, results = Experiment(runs, flags.iterations, flags.seeds, flags.mixing).run()
        path = runs.output / "result.json"
        found = {"photos": asdict(photo), "shapes": [asdict(result) for result in results]}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"\n{table(rows_of(photo, results))}\nAll of it is in {shown(path)}.   {runs.console.elapsed}")
        check_photos(photo)

    opening = (
        "A model learns photos, others made pictures, and what they learnt is measured. A quarter of an hour."
    )
    return run_example("the experiment", runs, opening, run)


if __name__ == "__main__":
    sys.exit(main())
