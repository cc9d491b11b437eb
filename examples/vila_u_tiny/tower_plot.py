"""The picture of the tower experiment: pictures, codes and retrieval of its towers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"full": "#1f618d", "no_contrast": "#c0392b", "no_reconstruction": "#7f8c8d"}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw PSNR by depth, PSNR over the iterations, and retrieval, a line or mark for each seed.

    Args:
        result: see `tower_experiment.Experiment.run`.
        path: of the PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (depths, curves, retrieved) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for place, (kind, scores) in enumerate(result["towers"].items()):
        title, colour = kind.replace("_", " "), COLOURS[kind]
        for seed, one in enumerate(scores):
            label = title if seed == 0 else None
            depths.plot(range(1, len(one["psnr"]) + 1), one["psnr"], "o-", color=colour, label=label)
            curve = result["curves"][f"{kind}_{seed}"]
            curves.plot(
                [r["iteration"] for r in curve], [r["PSNR"] for r in curve], color=colour, label=label
            )
            for side, mark in (("picture", "^"), ("text", "v")):
                retrieved.plot(place, 100 * one["retrieval"][side], mark, color=colour)
    for one in result["siglip"]:
        for side, mark in (("picture", "^"), ("text", "v")):
            retrieved.plot(len(COLOURS), 100 * one[side], mark, color="black")
    mean_colours = result["towers"]["full"][0]["mean_colours"]
    for axes in (depths, curves):
        axes.axhline(mean_colours, color="black", linestyle=":", label="mean colours")
        axes.grid(alpha=0.3)
    depths.set(xlabel="depths of codes", ylabel="PSNR, dB", xticks=range(1, len(scores[0]["psnr"]) + 1))
    curves.set(xlabel="iteration", ylabel="PSNR, dB")
    depths.legend()
    retrieved.axhline(100 * result["siglip"][0]["chance"], color="black", linestyle=":", label="chance")
    names = [*(kind.replace("_", " ") for kind in result["towers"]), "SigLIP"]
    retrieved.set(
        ylabel="top-1, %", title="up: picture of a text, down: text of a picture", xticks=range(len(names))
    )
    retrieved.set_xticklabels(names)
    retrieved.set_ylim(bottom=0)
    retrieved.legend()
    figure.suptitle("a toy tower on held-out stamps")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
