"""A curve of cosines by depth: its file, and the picture of one curve or several. Imports neither torch nor, at the
top, matplotlib."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_eve.runtime.errors import UserError


class CurveError(UserError, ValueError):
    """A file that holds no curve; the message names it and the remedy."""


class Cosines(NamedTuple):
    """Cosines between the picture rows and the text rows of a sample, or their means over samples.

    Attributes:
        mean: of all pairs of a picture row and a text row.
        nearest: of each row with the nearest row of the other kind: the mean over picture rows and that over text rows,
            half each. A Chamfer distance with cosines, as in arXiv 2312.07533.
    """

    mean: float
    nearest: float


@dataclass(frozen=True)
class AlignmentCurve:
    """What was measured of a model.

    Attributes:
        name: of the model, for the legend.
        model: folder of the checkpoint.
        family: of the model.
        iteration: of the checkpoint.
        data: path of the dataset.
        samples: how many were measured.
        depths: 0 is what enters the decoder, n what leaves its layer n.
        mean_cosine, nearest_cosine: for each depth (`Cosines`).
    """

    name: str
    model: str
    family: str
    iteration: int
    data: str
    samples: int
    depths: list[int]
    mean_cosine: list[float]
    nearest_cosine: list[float]

    @classmethod
    def of(cls, found: Mapping[int, Cosines], **what: Any) -> AlignmentCurve:
        """The curve of cosines by depth, and the other fields by name."""
        return cls(
            depths=list(found),
            mean_cosine=[some.mean for some in found.values()],
            nearest_cosine=[some.nearest for some in found.values()],
            **what,
        )

    @classmethod
    def read(cls, path: Path) -> AlignmentCurve:
        """Read a file of `write`.

        Raises:
            CurveError: it holds something else; OSError, it cannot be read.
        """
        try:
            curve = cls(**json.loads(path.read_text(encoding="utf-8")))
            lengths = {len(curve.depths), len(curve.mean_cosine), len(curve.nearest_cosine)}
            whole = lengths == {len(curve.depths)} and all(
                isinstance(value, int | float)
                for value in (*curve.depths, *curve.mean_cosine, *curve.nearest_cosine)
            )
        except (ValueError, TypeError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            whole = False
        if not whole:
            raise CurveError(f"{path}: not a curve; name files that --output of this command wrote")
        return curve

    def write(self, path: Path) -> None:
        """Write it as a JSON object."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def draw(curves: Sequence[AlignmentCurve], path: Path) -> None:
    """Draw curves into a PNG file: the cosine of the nearest rows on the left, that of all pairs on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, both = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharex=True)
    titles = ("each row and the nearest of the other kind", "all pairs of a picture row and a text row")
    for axes, title, values in zip(both, titles, ("nearest_cosine", "mean_cosine"), strict=True):
        for curve in curves:
            axes.plot(curve.depths, getattr(curve, values), marker="o", markersize=3, label=curve.name)
        axes.set(title=title, xlabel="decoder layer (0: embeddings)")
        axes.title.set_fontsize(10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    both[0].set_ylabel("cosine of picture and text")
    both[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
