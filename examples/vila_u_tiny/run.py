"""VILA-U at toy size: one model that reads and draws photos, with tensor and pipeline parallelism, on two cores.

It makes a vision tower with random weights, writes the codes of real photos, and trains a decoder as TP 2 x PP 2 to
say what a photo shows and to draw a photo from its sentence. The training is killed with SIGKILL and resumed, and its
losses must equal an uninterrupted run's bit for bit. Then the model captions three photos word for word and draws three
others, whose codes must be the stored ones; transformers draws the same from the export. That is learning by
heart; memory_experiment.py measures what more there is to it.

    python examples/vila_u_tiny/run.py
    make vila-u
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]  # which has what the examples need alike

from installed import installed_by  # noqa: E402

with installed_by("make vila-u", "matplotlib"):
    from launch import StepFailed, shown
    from report import Console, Records, table
    from runs import RANKS, Runs, example_parser, run_example
    from same_losses import require_same_losses
    from vila_u_tiny import inputs
    from vila_u_tiny.drawings import (
        draw,
        draw_with_transformers,
        drawing_folder,
        drawn_codes,
        equal_share,
        save_pictures,
        stored_codes,
    )
    from vila_u_tiny.random_tower import save_toy_tower
    from vila_u_tiny.sheet import Drawn, write_sheet

    from megatron_eve.config.recipe import load_recipe

STEPS = 8
RECIPE = EXAMPLES / "vila_u_tiny" / "pretrain.yaml"
DATASET = "photos"
CAPTIONED, DRAWN = ("chelsea", "coffee", "rocket"), ("astronaut", "camera", "horse")
"""The photos that the model captions at the end, and those whose sentences it draws."""
COMPARED, KILL_AT = 40, 33
"""Iterations of the uninterrupted run, and the iteration after which the other run is killed."""
LEAST_EQUAL = 0.95
"""Share of a drawing's codes that must be the stored ones."""


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
        found = self._make_inputs()
        records, killed = self._pretrain()
        step("Captions", f"one process tells what {len(CAPTIONED)} photos show")
        learnt = [([found[photo][0]], inputs.ASKED, found[photo][1]) for photo in CAPTIONED]
        said = runs.ask_learnt("pretraining", learnt, "--conv-mode", inputs.TEMPLATE)
        right = sum(answer == caption for answer, (_, _, caption) in zip(said, learnt, strict=True))
        step("Drawings", f"the same model draws {len(DRAWN)} other photos from their sentences")
        numbers = [list(found).index(photo) for photo in DRAWN]
        shares, without = self._draw(numbers, [found[photo][1] for photo in DRAWN])
        self._write_sheet(found, said, shares, records)
        step("Export", "to a folder for transformers, which draws the same sentences")
        same = self._draw_exported([found[photo][1] for photo in DRAWN])
        rows = [
            ("layout", f"TP 2 with sequence parallelism x PP 2, {RANKS} processes"),
            ("language loss", _losses(records, "lm_loss")),
            ("visual loss", _losses(records, "visual_loss")),
            ("killed, resumed", f"after iteration {killed}; {COMPARED} losses equal bit for bit"),
            ("captions word for word", f"{right} of {len(said)}"),
            ("codes of drawings as stored", ", ".join(map(_percent, shares))),
            ("the same with --cfg 0", ", ".join(map(_percent, without))),
            ("codes drawn by transformers", f"{_percent(min(same))} the same"),
            ("captions and drawings in", shown(runs.output / "sheet.png")),
            ("time", runs.console.elapsed),
        ]
        print("\n" + table(rows))
        print(f"What the commands printed is in {shown(runs.output / 'logs')}.")
        check_claims(records, right, shares, without, same)

    def _make_inputs(self) -> dict[str, tuple[str, str]]:
        """Photos, tokenizer, tower, the dataset with its codes; returns the photos by name."""
        runs, console = self.runs, self.runs.console
        console.step("Photos and tokenizer", f"pictures of scikit-image, {inputs.TOKENIZER_PIECES} pieces")
        shown_photos = inputs.export_photos(runs)
        inputs.train_tokenizer(runs, (sentence for _, _, sentence in shown_photos))
        console.step("Vision tower", "VILA-U's architecture with random weights, so nothing is downloaded")
        tower = save_toy_tower(runs.output / "tower")
        console.say(f"-> {shown(tower)}")
        console.step("Dataset and codes", "each photo twice, to be read and to be drawn; codes by the tower")
        inputs.make_dataset(runs, DATASET, shown_photos, tower, show=True)
        return {name: (file, sentence) for name, file, sentence in shown_photos}

    def _pretrain(self) -> tuple[Records, int]:
        """An uninterrupted run of the first iterations, and the whole of it with a kill.

        Returns:
            The records of the latter from its first to its last iteration, and after which iteration it was killed.
        """
        console = self.runs.console
        console.step(
            "Pretraining", f"as TP 2 x PP 2 on {RANKS} processes, {COMPARED} iterations for comparison"
        )
        reference = self._train("reference", "--exit-interval", COMPARED)
        console.step("Pretraining again", f"SIGKILL at about iteration {KILL_AT}; then all of it")
        killed = len(self._train("pretraining", stop_at=KILL_AT))
        records = self._train("pretraining", log="resumed", show=False)
        require_same_losses(reference, [one for one in records if one["iteration"] <= COMPARED], COMPARED)
        console.say(f"equal at the first {COMPARED} iterations, those after the resume included")
        return [*records[: records[killed]["iteration"] - 1], *records[killed:]], killed

    def _train(self, name: str, *flags: object, **settings: Any) -> list[dict[str, Any]]:
        return self.runs.train(
            name, (DATASET,), "--config", RECIPE, "--vision-tokenizer", self.runs.output / "tower", *flags,
            iterations=load_recipe(RECIPE).total_iterations, **settings,
        )  # fmt: skip

    def _draw(self, numbers: list[int], sentences: list[str]) -> tuple[list[float], list[float]]:
        """Draw photos from their sentences; returns the share of stored codes in each, and that with guidance 0."""
        runs = self.runs
        drawn = draw(runs, "pretraining", sentences, "asked", show=True)
        runs.console.say("and with --cfg 0, where the sentence does not count")
        unasked = draw(runs, "pretraining", sentences, "unasked", guidance=0)
        stored = stored_codes(runs.data / DATASET, numbers)
        save_pictures(runs.output / "tower", stored, drawing_folder(runs, "stored"))
        shares, without = (
            [equal_share(one, other) for one, other in zip(some, stored, strict=True)]
            for some in (drawn, unasked)
        )
        for sentence, share, other in zip(sentences, shares, without, strict=True):
            runs.console.say(sentence, f"    {_percent(share)} of the codes; with --cfg 0 {_percent(other)}")
        return shares, without

    def _draw_exported(self, sentences: list[str]) -> list[float]:
        """Export, draw with transformers; returns the share of codes of each that are those of tools/draw.py."""
        runs = self.runs
        runs.tool(
            "tools/convert_checkpoint.py", "export", "export", "--source", runs.folder("pretraining"), "--target",
            runs.folder("export"), "--tokenizer", runs.tokenizer, "--format", "transformers", "--dtype", "float32",
        )  # fmt: skip
        ours = drawn_codes(drawing_folder(runs, "asked"), len(sentences))
        theirs = draw_with_transformers(runs.folder("export"), sentences)
        same = [equal_share(one, other) for one, other in zip(theirs, ours, strict=True)]
        runs.console.say(f"{', '.join(map(_percent, same))} of the codes are those of tools/draw.py")
        return same

    def _write_sheet(
        self, found: dict[str, tuple[str, str]], said: list[str], shares: list[float], records: Records
    ) -> None:
        images, drawings = self.runs.data / "images", []
        for number, (photo, share) in enumerate(zip(DRAWN, shares, strict=True)):
            file, sentence = found[photo]
            pictures = [("the photo", images / file)]
            for name, title in (("stored", "its codes"), ("asked", "drawn"), ("unasked", "drawn, --cfg 0")):
                pictures.append((title, drawing_folder(self.runs, name) / f"{number:05d}_00.png"))
            drawings.append(Drawn(sentence, pictures, share))
        captions = [(images / found[photo][0], text) for photo, text in zip(CAPTIONED, said, strict=True)]
        write_sheet(captions, drawings, records, self.runs.output / "sheet.png")


def check_claims(
    records: Records, right: int, shares: list[float], without: list[float], same: list[float]
) -> None:
    """Check what the example claims.

    Args:
        records: of the training, from its first to its last iteration.
        right: captions that are the trained ones word for word.
        shares: of each drawing, the codes that are the stored ones.
        without: the same with guidance 0.
        same: of each drawing by transformers, the codes that are those of tools/draw.py.

    Raises:
        StepFailed: a claim does not hold; the message is one sentence.
    """
    for name, title in (("lm_loss", "language"), ("visual_loss", "visual")):
        if not records[-1][name] < 0.1 * records[0][name]:
            raise StepFailed(f"the {title} loss did not fall to a tenth: {_losses(records, name)}")
    if right < len(CAPTIONED):
        raise StepFailed("a caption is not the one that the model was trained on")
    if min(shares) < LEAST_EQUAL:
        raise StepFailed(f"only {_percent(min(shares))} of a drawing's codes are the stored ones")
    if max(without) >= LEAST_EQUAL:
        raise StepFailed("a drawing without its sentence (--cfg 0) has the codes of the photo all the same")
    if min(same) < 1:
        raise StepFailed(
            f"transformers draws other codes from the export: {_percent(min(same))} are the same"
        )


def _losses(records: Records, name: str) -> str:
    return f"{records[0][name]:.4f} at the start, {records[-1][name]:.4f} at the end"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def main() -> int:
    """Read the command line and run; returns the exit status."""
    flags = example_parser(__doc__, "vila_u").parse_args()
    runs = Runs(flags.output, Console(STEPS), inputs.DATASET_FLAGS)
    opening = (
        "VILA-U at toy size: photos -> codes -> a training to read and to draw, a kill -> captions, drawings, export\n"
        "About four minutes on two idle cores."
    )
    return run_example("vila-u", runs, opening, Example(runs).run)


if __name__ == "__main__":
    sys.exit(main())
