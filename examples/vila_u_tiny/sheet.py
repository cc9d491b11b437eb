"""The sheet of the VILA-U example: captions, drawings and losses in one PNG file."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from report import Records


@dataclass(frozen=True)
class Drawn:
    """A sentence and what was drawn from it.

    Attributes:
        sentence: the text.
        pictures: a title and a PNG or JPEG file for each picture that is shown beside the others.
        share: of codes that are equal to the stored ones, 0 to 1.
    """

    sentence: str
    pictures: Sequence[tuple[str, Path]]
    share: float


def write_sheet(
    captions: Sequence[tuple[Path, str]], drawings: Sequence[Drawn], records: Records, path: Path
) -> None:
    """Write the sheet: photos with the model's captions, drawings by sentence, and both losses.

    Args:
        captions: a photo, and what the model says of it.
        drawings: each with as many pictures as the others.
        records: of the training.
        path: of the PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    figure = pyplot.figure(figsize=(13, 7), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(3, 6, 4), squeeze=False)[0]
    left.suptitle("captions by the trained model", fontsize=11)
    middle.suptitle("drawings by the same model", fontsize=11)
    right.suptitle("pretraining as TP 2 x PP 2, without a GPU", fontsize=11)
    for (photo, caption), axes in zip(
        captions, left.subplots(len(captions), 1, squeeze=False)[:, 0], strict=True
    ):
        with Image.open(photo) as image:
            axes.imshow(image.convert("RGB"))
        axes.set_axis_off()
        axes.set_title(textwrap.fill(caption, 40), fontsize=9)
    rows = middle.subfigures(len(drawings), 1, squeeze=False)[:, 0]
    for drawing, row in zip(drawings, rows, strict=True):
        share = f"{100 * drawing.share:.0f} % of the codes"
        row.suptitle(f"{textwrap.fill(drawing.sentence, 70)}\n({share})", fontsize=9)
        for (title, file), axes in zip(
            drawing.pictures, row.subplots(1, len(drawing.pictures), squeeze=False)[0], strict=True
        ):
            with Image.open(file) as image:
                axes.imshow(image.convert("RGB"), interpolation="nearest")
            axes.set_axis_off()
            axes.set_title(title, fontsize=8)
    iterations = [record["iteration"] for record in records]
    axes = right.subplots()
    for name, title, colour in (
        ("lm_loss", "language loss", "#1f618d"),
        ("visual_loss", "visual loss", "#c0392b"),
    ):
        axes.plot(iterations, [record[name] for record in records], label=title, color=colour)
    axes.set(xlabel="iteration", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
