"""What does a toy tower of VILA-U learn? Measured on pictures that nothing was trained on.

For each seed a toy SigLIP trains on stamps with their sentences, and three towers from it: with all losses ("full"),
without the contrastive one, and without those of reconstruction. Each is scored on 120 held-out stamps: pictures by
depth against one mean colour for each code cell, codes in use, and which text belongs to which picture. The same
command goes on where it was stopped.

    apt-get install tuxpaint-stamps-default
    python examples/vila_u_tiny/tower_experiment.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]

from installed import installed_by  # noqa: E402

with installed_by("make vila-u", "matplotlib"):
    from launch import shown
    from report import Console, table
    from runs import Runs, example_parser, run_example
    from vila_u_tiny.pairs import SIDE, Pair, variants, write_pairs
    from vila_u_tiny.stamps import FOLDER, Stamps, read_stamps
    from vila_u_tiny.tower_plot import plot
    from vila_u_tiny.tower_scores import Score, load_trained, mean_score, read_score, score
    from vila_u_tiny.toy_siglip import Retrieval, save_toy_siglip, siglip_retrieval, train_tokenizer

    from megatron_eve.config.errors import ConfigError
    from megatron_eve.runtime.command_line import whole_number

RECIPE = EXAMPLES / "vila_u_tiny" / "tower_experiment.yaml"
DATASET_FLAGS = ("--family", "vila_u_tower", "--tower-size", SIDE)
KINDS: dict[str, tuple[object, ...]] = {
    "full": (),
    "no_contrast": ("--contrastive-weight", 0),
    "no_reconstruction": ("--reconstruction-weight", 0),
}
"""The towers of a seed, and the flags by which they differ."""
VARIANTS = 8
"""Of each stamp to train on: mirrored and moved."""
WORDS = 1000
"""Of the tokenizer, at most."""
EVALUATIONS = 8
"""Of a run on the held-out pairs, for the plot."""


@dataclass(frozen=True)
class Settings:
    """What the results depend on; kept in the folder, which goes on with the same ones alone.

    Attributes:
        iterations: of a tower.
        siglip_steps: of a SigLIP.
        ranks: processes of a run, which change no number beyond rounding.
    """

    iterations: int
    siglip_steps: int
    ranks: int


@dataclass(frozen=True)
class Experiment:
    """The steps; what is in the folder already is not made again.

    Attributes:
        runs: the folder.
        settings: of all runs.
        seeds: how many there are.
        stamps: folder of the stamps.
    """

    runs: Runs
    settings: Settings
    seeds: int
    stamps: Path

    def run(self) -> dict[str, Any]:
        """All steps; returns what comes out, for result.json."""
        runs, step = self.runs, self.runs.console.step
        step("Stamps", f"pictures with a sentence each, of {self.stamps}")
        self._check_settings()
        stamps = read_stamps(self.stamps)
        self._make_data(stamps)
        runs.console.say(
            f"{len(stamps.trained)} to train on, each {VARIANTS} times; {len(stamps.held_out)} held out"
        )
        scores: dict[str, list[Score]] = {kind: [] for kind in KINDS}
        starts: list[Retrieval] = []
        for seed in range(self.seeds):
            step("SigLIP", f"of seed {seed}, {self.settings.siglip_steps} steps on the stamps to train on")
            starts.append(self._make_siglip(seed, stamps))
        for kind, seed in self._all():
            step("Tower", f"{kind.replace('_', ' ')}, seed {seed}, {self.settings.iterations} iterations")
            scores[kind].append(self._score(kind, seed, stamps.held_out))
        return {
            "settings": {**asdict(self.settings), "trained": len(stamps.trained), "held_out": len(stamps.held_out)},
            "siglip": [asdict(one) for one in starts],
            "towers": {kind: [asdict(one) for one in some] for kind, some in scores.items()},
            "curves": {f"{kind}_{seed}": self._curve(kind, seed) for kind, seed in self._all()},
        }  # fmt: skip

    def _all(self) -> Iterator[tuple[str, int]]:
        return ((kind, seed) for kind in KINDS for seed in range(self.seeds))

    def _check_settings(self) -> None:
        """Refuse a folder of other settings.

        Raises:
            ConfigError: naming both.
        """
        path, ours = self.runs.output / "settings.json", asdict(self.settings)
        if not path.is_file():
            path.write_text(json.dumps(ours) + "\n", encoding="utf-8")
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs != ours:
            raise ConfigError(
                f"{path}: the results in this folder are of {theirs}, and these would be of {ours}; name another "
                "folder with --output, or use the same flags"
            )

    def _make_data(self, stamps: Stamps) -> None:
        """Tokenizer and both datasets."""
        runs = self.runs
        if (runs.data / "whole").is_file():
            return
        train_tokenizer([pair.sentence for pair in stamps.trained], runs.tokenizer, WORDS)
        for name, pairs in (
            ("trained", variants(stamps.trained, VARIANTS, seed=0)),
            ("held_out", stamps.held_out),
        ):
            rows = write_pairs(pairs, runs.data / "images", runs.data / f"{name}.json")
            runs.preprocess(name, rows, "siglip_pair", "--overwrite")
        (runs.data / "whole").touch()

    def _siglip(self, seed: int) -> Path:
        return self.runs.folder(f"siglip_{seed}")

    def _make_siglip(self, seed: int, stamps: Stamps) -> Retrieval:
        """Train the SigLIP of a seed; returns what it retrieves of the held-out pairs."""
        folder, runs = self._siglip(seed), self.runs
        if not (folder / "spiece.model").is_file():
            save_toy_siglip(stamps.trained, runs.tokenizer, folder, self.settings.siglip_steps, seed)
        found = siglip_retrieval(folder, stamps.held_out, runs.tokenizer)
        runs.console.say(f"{_retrieved(found)}   {runs.console.elapsed}")
        return found

    def _score(self, kind: str, seed: int, held_out: Sequence[Pair]) -> Score:
        """Train a tower, if that is not done, and score it."""
        name, runs = f"{kind}_{seed}", self.runs
        path = runs.output / "scores" / f"{name}.json"
        if not path.is_file():
            self._train(kind, seed)
            found = score(load_trained(runs.folder(name), self._siglip(seed)), held_out, runs.tokenizer)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
        found = read_score(path)
        runs.console.say(
            f"PSNR by depth {_numbers(found.psnr)} dB, mean colours {found.mean_colours:.2f}",
            f"codes in use {100 * found.in_use:.0f} %; {_retrieved(found.retrieval)}   {runs.console.elapsed}",
        )
        return found

    def _train(self, kind: str, seed: int) -> None:
        iterations = self.settings.iterations
        self.runs.train(
            f"{kind}_{seed}", ("trained",), "--config", RECIPE, "--vision-tower", self._siglip(seed), "--seed", seed,
            "--train-iters", iterations, "--valid-data-path", self.runs.data / "held_out",
            "--eval-interval", max(iterations // EVALUATIONS, 1), "--save-interval", max(iterations // 4, 1),
            *KINDS[kind], iterations=iterations,
        )  # fmt: skip

    def _curve(self, kind: str, seed: int) -> list[dict[str, Any]]:
        """The evaluations of a run on the held-out pairs."""
        lines = (
            (self.runs.folder(f"{kind}_{seed}") / "valid_losses.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()
        )
        # Iterations that a stopped run had behind its last checkpoint are there twice; the later ones count.
        return list({record["iteration"]: record for record in map(json.loads, lines)}.values())


def rows_of(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows for the closing table: means over the seeds, with the least and the most."""
    rows = []
    for kind, some in result["towers"].items():
        one = mean_score(some)
        title = kind.replace("_", " ")
        gains = [after - before for before, after in zip(one.psnr, one.psnr[1:], strict=False)]
        above = [each["psnr"][-1] - each["mean_colours"] for each in some]
        rows += [
            (f"{title}: PSNR by depth, dB", _numbers(one.psnr)),
            (f"{title}: what depths 2, 3 .. add, dB", _numbers(gains)),
            (f"{title}: above mean colours ({one.mean_colours:.2f}), dB", _spread(above)),
            (f"{title}: codes in use, %", _spread([100 * each["in_use"] for each in some])),
            (f"{title}: perplexity by depth", _numbers(one.perplexity)),
            (
                f"{title}: pictures of texts, %",
                _spread([100 * each["retrieval"]["picture"] for each in some]),
            ),
            (f"{title}: texts of pictures, %", _spread([100 * each["retrieval"]["text"] for each in some])),
        ]
    chance = result["siglip"][0]["chance"]
    for side, title in (("picture", "pictures of texts"), ("text", "texts of pictures")):
        rows.append((f"SigLIP: {title}, %", _spread([100 * one[side] for one in result["siglip"]])))
    return [*rows, ("chance, %", f"{100 * chance:.2f}")]


def _numbers(values: Sequence[float]) -> str:
    return "  ".join(f"{value:.2f}" for value in values)


def _spread(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _retrieved(found: Retrieval) -> str:
    return (
        f"top-1: pictures of texts {100 * found.picture:.1f} %, texts of pictures {100 * found.text:.1f} %, "
        f"chance {100 * found.chance:.1f} %"
    )


def main() -> int:
    """Read the command line and run; returns the exit status."""
    parser = example_parser(__doc__, "vila_u_tower_scores")
    parser.add_argument(
        "--stamps",
        type=Path,
        default=FOLDER,
        metavar="DIR",
        help="folder of the stamps, tuxpaint/stamps of the package (default: %(default)s)",
    )
    for flag, default, what in (
        ("--iterations", 400, "iterations of a tower, of 32 pairs each"),
        ("--siglip-steps", 800, "steps of a SigLIP, of 64 pairs each"),
        ("--seeds", 3, "of SigLIP and towers"),
        ("--ranks", 2, "processes of a run"),
    ):
        parser.add_argument(flag, type=whole_number(1), default=default, metavar="N", help=what)
    flags = parser.parse_args()
    steps = 1 + flags.seeds * (1 + len(KINDS))
    runs = Runs(
        flags.output, Console(steps), DATASET_FLAGS, ranks=flags.ranks, subfolder="runs", layout=(),
        program="megatron_eve.train_tower",
    )  # fmt: skip
    settings = Settings(flags.iterations, flags.siglip_steps, flags.ranks)

    def run() -> None:
        result = Experiment(runs, settings, flags.seeds, flags.stamps).run()
        path, picture = runs.output / "result.json", runs.output / "result.png"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        plot(result, picture)
        print(f"\n{table(rows_of(result))}\nAll of it is in {shown(path)}, and {shown(picture)}.")

    opening = "Three towers of each seed learn from stamps, and are measured on others."
    return run_example("the experiment", runs, opening, run, goes_on=True)


if __name__ == "__main__":
    sys.exit(main())
