"""Does a model look at its pictures, or has it learnt answers by heart? VILA at toy size on coloured shapes.

Vision tower, projector and decoder start from random weights and train on conversations about one picture and about
two (stage 1, then stage 3 with --no-freeze-ViT). Then the model is asked about pictures that it was trained on, about
others, about combinations of colour and shape that were in no picture, about pairs in both orders, and about grey
pictures.

    python examples/vila_tiny/picture_experiment.py
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

with installed_by("make vila"):
    import photos
    import tokenizer
    from launch import shown
    from report import Console, table
    from runs import Question, Runs, example_parser, run_example
    from vila_tiny import inputs, shapes
    from vila_tiny.shapes import Picture

    from megatron_eve.runtime.command_line import whole_number

PROJECTOR = ("--projector-type", "mlp_downsample")
"""16 rows a picture in the place of 64, so that as much time trains on more samples."""
STAGE1_ITERATIONS, RATES = 20, {1: 1e-3, 3: 1.5e-3}
RUNS = ("stage3", "stage3_again")
"""Stage 3 runs twice, the second time from the weights of the first, and questions are asked after each."""
REPEATED = 50
"""How often the tokenizer reads the texts of this experiment, beside captions that fill its vocabulary."""


@dataclass(frozen=True)
class Score:
    """Shares of right answers, 0 to 1.

    Attributes:
        questions: how many pictures were asked about.
        colour, shape, both: shares in which these were right.
    """

    questions: int
    colour: float
    shape: float
    both: float


@dataclass(frozen=True)
class Pair:
    """Two pictures that differ in colour and in shape, and the answers about them.

    Attributes:
        number: of the pair.
        kind: of its pictures.
        pictures: both.
    """

    number: int
    kind: str
    pictures: tuple[Picture, Picture]

    def ids(self) -> list[list[str]]:
        """Ids of the questions: for each order of the pictures, those about the first and the second."""
        return [[f"{self.kind} {self.number} {order} {name}" for name in shapes.ORDINALS] for order in "ab"]

    def questions(self) -> list[Question]:
        """About the first and the second picture, in both orders."""
        one, other = (picture.name for picture in self.pictures)
        return [
            (key, names, shapes.asked_of(ordinal))
            for names, keys in zip(((one, other), (other, one)), self.ids(), strict=True)
            for key, ordinal in zip(keys, shapes.ORDINALS, strict=True)
        ]


def pairs_of(kind: str, pictures: Sequence[Picture]) -> list[Pair]:
    """Each picture with the next one behind it that differs in colour and in shape."""
    made = []
    for number, one in enumerate(pictures):
        behind = [*pictures[number + 1 :], *pictures[:number]]
        other = next(p for p in behind if p.colour != one.colour and p.shape != one.shape)
        made.append(Pair(number, kind, (one, other)))
    return made


def score(found: Sequence[tuple[Picture, str]]) -> Score:
    """Score answers, each with the picture that was asked about."""
    colour = [picture.colour in answer.split() for picture, answer in found]
    shape = [picture.shape in answer.split() for picture, answer in found]
    both = [one and other for one, other in zip(colour, shape, strict=True)]
    count = len(found)
    return Score(count, sum(colour) / count, sum(shape) / count, sum(both) / count)


def exchanged(pair: Pair, answers: dict[str, str]) -> bool:
    """Whether the answers about first and second picture differ, and are exchanged with the pictures."""
    (first, second), (first_after, second_after) = ([answers[key] for key in keys] for keys in pair.ids())
    return first != second and (first_after, second_after) == (second, first)


@dataclass(frozen=True)
class Result:
    """What comes out.

    Attributes:
        scores: by what was asked.
        exchanged: share of pairs whose answers are exchanged with the pictures, by the kind of pictures.
        grey: answers to the questions with grey pictures.
    """

    scores: dict[str, Score]
    exchanged: dict[str, float]
    grey: dict[str, str]

    def rows(self) -> list[tuple[str, str]]:
        """Rows for the closing table, in percent."""
        rows = [("right answers in %", "colour  shape   both")]
        for title, one in self.scores.items():
            rows.append(
                (title, "".join(f"{100 * share:6.0f}  " for share in (one.colour, one.shape, one.both)))
            )
        rows += [
            (f"answers exchanged: {kind}", f"{100 * share:6.0f}") for kind, share in self.exchanged.items()
        ]
        return rows


@dataclass(frozen=True)
class Experiment:
    """The steps.

    Attributes:
        runs: the folder.
        pictures: to train on.
        iterations: of stage 3, each time.
        asked: pictures of each kind that the model is asked about.
    """

    runs: Runs
    pictures: int
    iterations: int
    asked: int

    def run(self) -> dict[str, Result]:
        """All steps; returns what comes out of each of `RUNS`."""
        step = self.runs.console.step
        step("Data", f"{self.pictures} pictures of {len(shapes.SEEN)} combinations of colour and shape")
        trained = self._make_inputs()
        step("Stage 1", "the projector trains on captions; vision tower and decoder are random and frozen")
        tower = ("--vision-tower", self.runs.output / "tower")
        self._train("stage1", 1, "captions", STAGE1_ITERATIONS, None, *tower)
        results, start = {}, "stage1"
        for name in RUNS:
            step(
                "Stage 3", f"tower, projector and decoder train on conversations, from the weights of {start}"
            )
            self._train(
                name, 3, "conversations", self.iterations, start, "--no-freeze-ViT", show=start == "stage1"
            )
            step(
                "Answers", "about pictures trained on, new ones, combinations held out, pairs, grey pictures"
            )
            results[name], start = self._ask(name, trained), name
        return results

    def _make_inputs(self) -> list[Picture]:
        """Pictures, tokenizer, datasets, tower; returns the pictures."""
        data = self.runs.data
        drawn = shapes.draw("trained", self.pictures, shapes.SEEN, data / "images")
        texts = [*shapes.texts(), tokenizer.TEMPLATE_TEXT] * REPEATED
        tokenizer.train([*photos.load_captions().values(), *texts], self.runs.tokenizer)
        captions = shapes.write_captions(drawn, data / "captions.json")
        self.runs.preprocess("captions", captions, "plain", *PROJECTOR)
        conversations = shapes.write_conversations(drawn, data / "conversations.json")
        self.runs.preprocess("conversations", conversations, "vila_v1", *PROJECTOR)
        inputs.save_tower(self.runs.output / "tower")
        return drawn

    def _train(
        self,
        name: str,
        stage: int,
        data: str,
        iterations: int,
        start: str | None,
        *flags: object,
        show: bool = False,
    ) -> None:
        self.runs.train(
            name, (data,), "--preset", inputs.PRESET, "--stage", stage, "--train-iters", iterations,
            "--global-batch-size", 16, "--seq-length", 2048, "--lr", RATES[stage], "--lr-warmup-fraction", 0.1,
            "--adam-beta2", 0.98, "--save-interval", iterations, *PROJECTOR, *flags, start=start, show=show,
        )  # fmt: skip

    def _ask(self, name: str, trained: Sequence[Picture]) -> Result:
        """Draw what the model of a run is asked about, ask, and score."""
        images, held_out = self.runs.data / "images", tuple(sorted(shapes.HELD_OUT))
        shapes.draw_grey(images)
        drawn = {
            "trained on": trained[: self.asked],
            "new draws": shapes.draw("new", self.asked, shapes.SEEN, images),
            "combinations held out": shapes.draw("held_out", self.asked, held_out, images),
        }
        pairs = {kind: pairs_of(kind, pictures) for kind, pictures in drawn.items()}
        one = (shapes.COLOUR, shapes.SHAPE)
        two = tuple(map(shapes.asked_of, shapes.ORDINALS))
        questions: list[Question] = [
            (f"{picture.name} {text}", [picture.name], text)
            for pictures in drawn.values()
            for picture in pictures
            for text in one
        ]
        questions += [question for some in pairs.values() for pair in some for question in pair.questions()]
        questions += [(text, [shapes.GREY], text) for text in one] + [
            (text, [shapes.GREY] * 2, text) for text in two
        ]
        answers = self.runs.ask(name, questions, "--max-new-tokens", 8, "--batch-size", 32)
        # Both questions about a picture in one text: no colour is a shape.
        scores = {
            f"one picture, {kind}": score(
                [(p, " ".join(answers[f"{p.name} {text}"] for text in one)) for p in pictures]
            )
            for kind, pictures in drawn.items()
        }
        new = drawn["new draws"]
        scores["one picture, grey"] = score([(p, " ".join(answers[text] for text in one)) for p in new])
        for kind, some in pairs.items():
            for place, ordinal in enumerate(shapes.ORDINALS):
                found = [
                    (pair.pictures[place ^ order], answers[keys[place]])
                    for pair in some
                    for order, keys in enumerate(pair.ids())
                ]
                scores[f"{ordinal} of two, {kind}"] = score(found)
        for text, ordinal in zip(two, shapes.ORDINALS, strict=True):
            scores[f"{ordinal} of two, grey"] = score([(p, answers[text]) for p in new])
        return Result(
            scores=scores,
            exchanged={
                kind: sum(exchanged(pair, answers) for pair in some) / len(some)
                for kind, some in pairs.items()
            },
            grey={text: answers[text] for text in (*one, *two)},
        )


def main() -> int:
    """Read the command line and run; returns the exit status."""
    parser = example_parser(__doc__, "vila_pictures")
    for flag, default, what in (
        ("--pictures", 4800, "pictures to train on"),
        ("--iterations", 900, "iterations of stage 3, which runs twice, of 16 conversations each"),
        (
            "--asked",
            48,
            "pictures of each kind to ask about; a multiple of 12 has each combination equally often",
        ),
    ):
        parser.add_argument(flag, type=whole_number(1), default=default, metavar="N", help=what)
    flags = parser.parse_args()
    if flags.asked % len(shapes.SEEN) or flags.asked > flags.pictures:
        parser.error(f"--asked {flags.asked}: must be a multiple of {len(shapes.SEEN)}, at most --pictures")

    runs = Runs(flags.output, Console(2 + 2 * len(RUNS)), inputs.DATASET_FLAGS, ranks=1, subfolder="runs")

    def run() -> None:
        results = Experiment(runs, flags.pictures, flags.iterations, flags.asked).run()
        path = runs.output / "result.json"
        found = {name: asdict(result) for name, result in results.items()}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        for name, result in results.items():
            print(f"\n{name}\n{table(result.rows())}")
            for question, answer in result.grey.items():
                runs.console.say(f"grey pictures: {question} {answer}")
        print(f"All of it is in {shown(path)}.   {runs.console.elapsed}")

    opening = "A model learns coloured shapes, and is asked about others. About ten minutes on two cores."
    return run_example("the experiment", runs, opening, run)


if __name__ == "__main__":
    sys.exit(main())
