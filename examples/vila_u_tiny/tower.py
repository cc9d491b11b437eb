"""VILA-U's tower at toy size: a training that turns a SigLIP into a tower that makes codes and pictures, on two cores.

A toy SigLIP trains on crops of photos and their sentences. From it a tower is trained by two processes with all its
losses, the adversarial one from iteration 25 on. The training is killed with SIGKILL and resumed, and its losses must
equal an uninterrupted run's bit for bit. Then the trained tower writes the codes of a dataset, and a sheet shows photos
beside what their codes give. tower_experiment.py measures what a tower learns of pictures that it has not seen.

    python examples/vila_u_tiny/tower.py
    make vila-u-tower
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quickstart")]  # which has what the examples need alike

from installed import installed_by  # noqa: E402

with installed_by("make vila-u-tower"):
    from launch import StepFailed, shown
    from report import Console, Records, table
    from runs import Runs, example_parser, run_example
    from same_losses import require_same_losses
    from vila_u_tiny import inputs
    from vila_u_tiny.crops import photo_centres, photo_crops
    from vila_u_tiny.drawings import stored_codes
    from vila_u_tiny.pairs import SIDE, write_pairs
    from vila_u_tiny.tower_scores import Score, load_trained, score
    from vila_u_tiny.toy_siglip import save_toy_siglip, train_tokenizer

    from megatron_eve.config.recipe import load_recipe

STEPS = 6
RECIPE = EXAMPLES / "vila_u_tiny" / "train_tower.yaml"
DATASET_FLAGS = ("--family", "vila_u_tower", "--tower-size", SIDE)
TEMPLATE = "siglip_pair"
RANKS = 2
DATASET, CROPS = "crops", 16
"""Of the training; crops of each photo."""
WORDS = 300
"""Of the tokenizer, at most."""
SIGLIP_STEPS = 150
COMPARED, KILL_AT = 40, 33
"""Iterations of the uninterrupted run, and the iteration after which the other run is killed."""
SHOWN = ("astronaut", "chelsea", "coffee", "rocket")
"""Photos on the sheet."""


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
        self._make_inputs()
        records, killed = self._train_tower()
        step("Codes", "the trained tower writes those of a dataset of photos to be read and drawn")
        codes = self._write_codes()
        step("Sheet", "photos, and what their codes give at each depth")
        sheet = self._write_sheet()
        step("Scores", "of the middle of each photo, which no crop is exactly")
        found = score(load_trained(runs.folder("tower"), self._siglip), photo_centres(), runs.tokenizer)
        rows = [
            ("layout", f"{RANKS} processes, data parallel"),
            ("reconstruction loss", _ends(records, "reconstruction_loss")),
            ("perceptual loss (random features)", _ends(records, "perceptual_loss")),
            ("contrastive loss", _ends(records, "contrastive_loss")),
            ("discriminator loss", _ends(records, "discriminator_loss")),
            ("killed, resumed", f"after iteration {killed}; {COMPARED} losses equal bit for bit"),
            ("PSNR by depth, dB", ", ".join(f"{one:.2f}" for one in found.psnr)),
            ("the same, a mean colour for each code cell", f"{found.mean_colours:.2f}"),
            ("codes in use", _percent(found.in_use)),
            ("texts of photos found", f"{_percent(found.retrieval.text)} (chance {_percent(found.retrieval.chance)})"),
            ("codes written", f"{codes:,}"),
            ("photos and reconstructions in", shown(sheet)),
            ("time", runs.console.elapsed),
        ]  # fmt: skip
        print("\n" + table(rows))
        print(f"What the commands printed is in {shown(runs.output / 'logs')}.")
        check_claims(records, found)

    @property
    def _siglip(self) -> Path:
        return self.runs.output / "siglip"

    def _make_inputs(self) -> None:
        """Crops, tokenizer, SigLIP, dataset."""
        runs, console = self.runs, self.runs.console
        crops = photo_crops(CROPS, seed=0)
        console.step("SigLIP", f"{SIGLIP_STEPS} steps on {len(crops)} crops of photos with their sentences")
        train_tokenizer([pair.sentence for pair in crops], runs.tokenizer, WORDS)
        losses = save_toy_siglip(crops, runs.tokenizer, self._siglip, SIGLIP_STEPS)
        console.say(
            f"loss {losses[0]:.2f} -> {losses[-1]:.2f}   {console.elapsed}   -> {shown(self._siglip)}"
        )
        console.step("Dataset", "pairs of a crop and its sentence")
        rows = write_pairs(crops, runs.data / "images", runs.data / f"{DATASET}.json")
        runs.preprocess(DATASET, rows, TEMPLATE, show=True)

    def _train_tower(self) -> tuple[Records, int]:
        """An uninterrupted run of the first iterations, and the whole of it with a kill.

        Returns:
            The records of the latter from its first to its last iteration, and after which iteration it was killed.
        """
        console = self.runs.console
        console.step(
            "Training", f"{COMPARED} iterations for comparison; then SIGKILL at {KILL_AT}, and all of it"
        )
        reference = self._train("reference", "--exit-interval", COMPARED)
        killed = len(self._train("tower", stop_at=KILL_AT, show=False))
        records = self._train("tower", log="resumed", show=False)
        require_same_losses(reference, [one for one in records if one["iteration"] <= COMPARED], COMPARED)
        console.say(f"equal at the first {COMPARED} iterations, those after the resume included")
        return [*records[: records[killed]["iteration"] - 1], *records[killed:]], killed

    def _train(self, name: str, *flags: object, **settings: Any) -> list[dict[str, Any]]:
        return self.runs.train(
            name, (DATASET,), "--config", RECIPE, "--vision-tower", self._siglip, *flags,
            iterations=load_recipe(RECIPE).total_iterations, **settings,
        )  # fmt: skip

    def _write_codes(self) -> int:
        """Codes of whole photos, each to be read and to be drawn; returns how many were written."""
        runs = Runs(self.runs.folder("photos"), self.runs.console, inputs.DATASET_FLAGS)
        photos = inputs.export_photos(runs)
        inputs.train_tokenizer(runs, (sentence for _, _, sentence in photos))
        inputs.make_dataset(runs, "photos", photos, self.runs.folder("tower"))
        written = stored_codes(runs.data / "photos", range(len(photos)))
        runs.console.say(f"{len(photos)} photos -> {shown(runs.data / 'photos')}   {runs.console.elapsed}")
        return sum(codes.size for codes in written)

    def _write_sheet(self) -> Path:
        centres = [pair for pair in photo_centres() if pair.name in SHOWN]
        images, sheet = self.runs.data / "centres", self.runs.output / "sheet.png"
        write_pairs(centres, images, self.runs.data / "centres.json")
        files = [images / f"{pair.name}.png" for pair in centres]
        self.runs.tool(
            "tools/reconstruct.py", "reconstruct", "--tower", self.runs.folder("tower"), "--input", *files,
            "--output", sheet,
        )  # fmt: skip
        return sheet


def check_claims(records: Records, found: Score) -> None:
    """Check what the example claims.

    Args:
        records: of the training, from its first to its last iteration.
        found: of the trained tower.

    Raises:
        StepFailed: a claim does not hold; the message is one sentence.
    """
    if not records[-1]["reconstruction_loss"] < 0.5 * records[0]["reconstruction_loss"]:
        raise StepFailed(
            f"the reconstruction loss did not fall to a half: {_ends(records, 'reconstruction_loss')}"
        )
    began = [record["iteration"] for record in records if "discriminator_loss" in record]
    wanted = load_recipe(RECIPE).vision.gan_start + 1
    if not began or began[0] != wanted:
        raise StepFailed(f"the discriminator has not trained from iteration {wanted} on")
    if not found.psnr[-1] > found.psnr[0]:
        raise StepFailed("all depths of the codes together make no better picture than the first alone")
    if found.retrieval.text < 3 * found.retrieval.chance:
        raise StepFailed(
            f"the texts of {_percent(found.retrieval.text)} of the photos are found, which is chance"
        )


def _ends(records: Records, name: str) -> str:
    values = [record[name] for record in records if name in record]
    return f"{values[0]:.4f} at the start, {values[-1]:.4f} at the end" if values else "none"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def main() -> int:
    """Read the command line and run; returns the exit status."""
    flags = example_parser(__doc__, "vila_u_tower").parse_args()
    runs = Runs(
        flags.output,
        Console(STEPS),
        DATASET_FLAGS,
        ranks=RANKS,
        layout=(),
        program="megatron_eve.train_tower",
    )
    opening = (
        "A toy SigLIP becomes a tower of codes: photos -> training with a kill -> codes, reconstructions\n"
        "Three to four minutes on two idle cores."
    )
    return run_example("vila-u-tower", runs, opening, Example(runs).run)


if __name__ == "__main__":
    sys.exit(main())
