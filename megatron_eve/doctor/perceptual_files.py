"""Can the weights of the perceptual loss be read? Files that a run of `megatron_eve.train_tower` names."""

from __future__ import annotations

from pathlib import Path

from megatron_eve.doctor.plan import ReportLine
from megatron_eve.doctor.problems import Problem

_LABEL = "perceptual loss"


def perceptual_files(weights: Path, linear: Path | None) -> tuple[ReportLine, Problem | None]:
    """A line of the report about them, and what is wrong with them, if anything.

    Args:
        weights: with a VGG-16, and the five maps if `linear` is None.
        linear: with the five maps.
    """
    try:
        from megatron_eve.config.errors import ConfigError
        from megatron_eve.models.towers.perceptual import check_perceptual
    except (
        Exception
    ) as error:  # a broken installation can raise anything; what is wrong with it is said elsewhere
        return (_LABEL, f"{weights} not read: {type(error).__name__}"), None
    try:
        check_perceptual(weights, linear)
    except (ConfigError, OSError) as error:
        return (_LABEL, f"{weights} of no use"), Problem(
            str(error),
            "the files, and where they come from, are in docs/vila_u.md (What a training computes)",
        )
    files = " and ".join(str(path) for path in (weights, linear) if path is not None)
    return (_LABEL, f"a VGG-16 and its five maps in {files}"), None
