"""Do pictures count? Questions about coloured shapes: swapped pictures, grey ones, and combinations never seen.

Tower, projector and decoder train, from random weights, on questions about one picture and about the first and the
second of two, which show twelve of the sixteen combinations of four colours and four shapes.

    python examples/vila_tiny/shapes_experiment.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]

NEEDED = "is not installed: make vila installs it, or pip install '.[quickstart]'"

try:
    import tokenizer
    from folder import NotOurs, check, prepare
    from launch import ROOT, StepFailed, shown
    from report import Console, table
    from vila_tiny import inputs, shapes
    from vila_tiny.runs import PRESET, Question, Runs
    from vila_tiny.shapes import Shape

    from megatron_eve.config.presets import PRESETS
    from megatron_eve.runtime.command_line import command_parser_of, whole_number
except ModuleNotFoundError as error:
    print(f"error: {error.name} {NEEDED}", file=sys.stderr)
    sys.exit(2)

TEMPLATE = "vila_v1"
TRAINED_OF_EACH, NEW_OF_EACH = 80, 4
TRAINED_PAIRS, ASKED_PAIRS = 600, 32
PROJECTOR = ("--projector-type", "mlp_downsample")  # 16 rows for a picture, not 64: four times as fast
RUN = "shapes"
CHANCE = 1 / len(shapes.TRAINED)
MEMORISING = 0.1
"""Trained pictures that are answered more often than new ones by more than this share are called memorised."""


@dataclass(frozen=True)
class Rates:
    """What share of a kind of questions is answered rightly.

    Attributes:
        both: colour and shape.
        colour: the colour, whatever the shape.
        shape: the shape, whatever the colour.
        count: of questions.
    """

    both: float
    colour: float
    shape: float
    count: int

    @classmethod
    def of(cls, questions: Sequence[Question], answers: Sequence[str]) -> Rates:
        """Compare answers with what is right, word for word."""
        hits = [0, 0, 0]
        for question, answer in zip(questions, answers, strict=True):
            _, colour, shape = question.right.rstrip(".").split()
            said = answer.rstrip(".").split()
            found = answer == question.right, colour in said, shape in said
            hits = [total + one for total, one in zip(hits, found, strict=True)]
        both, colours, forms = (hit / len(questions) for hit in hits)
        return cls(both, colours, forms, len(questions))

    def __str__(self) -> str:
        return f"{self.both:4.0%}   colour {self.colour:4.0%}   shape {self.shape:4.0%}   of {self.count}"


@dataclass(frozen=True)
class Experiment:
    """The steps.

    Attributes:
        runs: the folder.
        iterations: of the training.
    """

    runs: Runs
    iterations: int

    def run(self) -> dict[str, Rates | float]:
        """Train and ask; returns what came out by its name in the table."""
        runs = self.runs
        prepare(runs.output)
        runs.console.step("Data", "pictures of coloured shapes, and questions about one and about two")
        images = runs.data / "images"
        trained = shapes.make(shapes.TRAINED, TRAINED_OF_EACH, 0, "trained", images)
        new = shapes.make(shapes.TRAINED, NEW_OF_EACH, 1, "new", images)
        unseen = shapes.make(shapes.HELD_OUT, 2 * NEW_OF_EACH, 2, "unseen", images)
        shapes.make_grey(images)
        self._make_dataset(trained)
        runs.console.step(
            "Training", f"{self.iterations} iterations of stage 3; tower, projector and decoder train"
        )
        runs.train(
            RUN, ("conversations",), "--stage", 3, *PROJECTOR, "--no-freeze-ViT", "--vision-tower",
            runs.output / "tower", "--train-iters", self.iterations, "--global-batch-size", 32, "--seq-length", 2048,
            "--lr", 2e-3, "--lr-warmup-fraction", 0.1, "--adam-beta2", 0.95, "--save-interval", self.iterations,
            show=True,
        )  # fmt: skip
        runs.console.step("Questions", "about pictures that were trained on, new, swapped, grey, never seen")
        return self._measure(trained[: len(new)], new, unseen)

    def _make_dataset(self, trained: list[Shape]) -> None:
        runs = self.runs
        questions = shapes.alone(trained)
        for one, other in shapes.pairs(trained, TRAINED_PAIRS, 3):
            questions += shapes.about(one, other)
        rows = shapes.write_conversations(questions, runs.data / "conversations.json")
        words = [f"A {colour} {shape}." for colour, shape in shapes.COMBINATIONS]
        tokenizer.train([*words * 8, shapes.ALONE, inputs.FIRST, inputs.SECOND], runs.tokenizer)
        runs.preprocess("conversations", rows, TEMPLATE, *PROJECTOR)
        inputs.save_tower(runs.output / "tower", PRESETS[PRESET].vision)

    def _measure(
        self, trained: list[Shape], new: list[Shape], unseen: list[Shape]
    ) -> dict[str, Rates | float]:
        asked = shapes.pairs(new, ASKED_PAIRS, 4)
        straight = [question for one, other in asked for question in shapes.about(one, other)]
        swapped = [question for one, other in asked for question in shapes.about(other, one)]
        grey = [replace(one, pictures=[shapes.GREY] * len(one.pictures)) for one in shapes.alone(new)]
        grey_two = [replace(one, pictures=[shapes.GREY] * 2) for one in straight]
        kinds = {
            "trained pictures": shapes.alone(trained),
            "new pictures": shapes.alone(new),
            "one of two new pictures": straight,
            "the same two, swapped": swapped,
            "grey in place of one": grey,
            "grey in place of two": grey_two,
            "combinations never seen": shapes.alone(unseen),
        }
        every = [question for questions in kinds.values() for question in questions]
        answers = iter(self.runs.ask("shapes", RUN, TEMPLATE, every))
        given = {name: [next(answers) for _ in questions] for name, questions in kinds.items()}
        found: dict[str, Rates | float] = {
            name: Rates.of(questions, given[name]) for name, questions in kinds.items()
        }
        found["swapping swaps the answers"] = self._swaps(
            given["one of two new pictures"], given["the same two, swapped"]
        )
        return found

    @staticmethod
    def _swaps(straight: Sequence[str], swapped: Sequence[str]) -> float:
        """How often the two answers about a pair, which differ, change places with the pictures."""
        before = list(zip(straight[::2], straight[1::2], strict=True))
        after = list(zip(swapped[::2], swapped[1::2], strict=True))
        changed = [
            first != second and (first, second) == (last, former)
            for (first, second), (former, last) in zip(before, after, strict=True)
        ]
        return sum(changed) / len(changed)


def verdict(trained: Rates, new: Rates) -> str:
    """What the rates of trained and of new pictures say, in a sentence."""
    memorised = trained.both - new.both
    if trained.both < 2 * CHANCE:
        return "Trained pictures are answered hardly better than by chance: the pictures do not count yet."
    if memorised > MEMORISING:
        return f"Of the trained pictures {memorised:.0%} more are answered than of new ones: that part is memorised."
    return (
        "New pictures of trained combinations are answered like the trained ones, so these are not memorised."
    )


def main() -> int:
    """Read the command line and run; returns the exit status."""
    parser = command_parser_of(__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "vila_shapes",
        metavar="DIR",
        help="folder for all that is made (default: vila_shapes)",
    )
    parser.add_argument(
        "--iterations", type=whole_number(1), default=300, metavar="N", help="iterations of the training"
    )
    flags = parser.parse_args()
    output = flags.output.resolve()
    try:
        check(output)
    except NotOurs as found:
        print(f"error: {found}: move it away, or choose another folder with --output", file=sys.stderr)
        return 2
    runs = Runs(output, Console(3))
    try:
        results = Experiment(runs, flags.iterations).run()
    except StepFailed as failure:
        print(f"\nthe experiment failed: {failure}", file=sys.stderr)
        return 1
    values = {name: one.__dict__ if isinstance(one, Rates) else one for name, one in results.items()}
    (output / "result.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    rows = [(name, str(one) if isinstance(one, Rates) else f"{one:4.0%}") for name, one in results.items()]
    chance = f"{CHANCE:4.0%}   colour {1 / len(shapes.COLOURS):4.0%}"
    print("\n" + table([*rows, ("chance", f"{chance}   shape {1 / len(shapes.SHAPES):4.0%}")]))
    trained, new = results["trained pictures"], results["new pictures"]
    assert isinstance(trained, Rates) and isinstance(new, Rates)
    print(verdict(trained, new))
    print(f"The numbers are in {shown(output / 'result.json')}.   {runs.console.elapsed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
