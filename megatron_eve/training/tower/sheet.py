"""A sheet of held-out pictures beside what a tower in training makes of their codes: `SAVE/reconstructions/`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_eve.data.dataset import VisionDataset
from megatron_eve.data.inspecting.reconstruction import draw_sheet, reconstruct
from megatron_eve.data.sampling.orders import DatasetSlice
from megatron_eve.data.sampling.pairs import PairLoader
from megatron_eve.data.sampling.permutation import sample_order
from megatron_eve.models.towers.trainable import TrainableTower
from megatron_eve.runtime.accelerator import accelerator

FOLDER, PICTURES = "reconstructions", 8


def sheet_path(save: str, iteration: int) -> Path:
    """The file of the sheet that belongs to an evaluation."""
    return Path(save) / FOLDER / f"iter_{iteration:07d}.png"


def write_sheet(
    path: Path,
    tower: TrainableTower,
    dataset: VisionDataset,
    loader: PairLoader,
    held_out: Sequence[DatasetSlice],
) -> None:
    """Write the sheet: a row for each picture, with its reconstruction at each depth and the PSNR (`draw_sheet`).

    Always the same pictures, those that an evaluation takes first: `PICTURES` in all, or one of each dataset. A file
    that cannot be written does not end the run.

    Args:
        path: of the PNG file.
        tower: in evaluation mode.
        dataset: of the run.
        loader: of the run; its position in the order does not change.
        held_out: held-out part of each dataset; one at least.
    """
    each = max(PICTURES // len(held_out), 1)
    samples = np.concatenate(
        [part.samples(sample_order(np.arange(min(each, len(part))), len(part), seed=0)) for part in held_out]
    )
    images = dataset.samples[samples]["first_image"].tolist()
    pixels = loader.read(samples).pixels.numpy()
    found = [
        reconstruct(tower, dataset.image_name(image), square, accelerator().device)
        for image, square in zip(images, pixels, strict=True)
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(found).save(path)
        print(f" held-out pictures beside their reconstructions: {path}", flush=True)
    except OSError as error:  # such as a full disk
        print(f" {path} could not be written ({error.strerror or error}); the run goes on", flush=True)
