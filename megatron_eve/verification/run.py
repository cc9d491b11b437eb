"""Selects the check for a golden folder."""

from __future__ import annotations

from pathlib import Path

from megatron_eve.config import ConfigError, ParallelConfig
from megatron_eve.models.family import ModelFamily
from megatron_eve.verification.cases import (
    batch_case,
    check_pictures_alone,
    check_preprocess,
    check_tokenize,
    read_model_case,
)
from megatron_eve.verification.forms import is_model_case, reading_family, tower_golden
from megatron_eve.verification.greedy import check_greedy
from megatron_eve.verification.model_cases import check_comparisons, check_model_case
from megatron_eve.verification.optimizer_steps import check_steps
from megatron_eve.verification.results import CheckResult
from megatron_eve.verification.rows import check_rows


def check_folder(folder: Path, parallel: ParallelConfig, recompute: bool = False) -> list[CheckResult]:
    """All rows of one golden folder under a layout; the process group must exist. Collective.

    Args:
        folder: the case.
        parallel: the layout.
        recompute: run model cases with full recomputation.

    Raises:
        ConfigError: the folder is of no known form, or lacks files.
    """
    if (family := reading_family(folder)) is not None:
        return _check_own_form(family, folder, parallel, recompute)
    if (golden := tower_golden(folder)) is not None:
        return check_comparisons(folder, golden, parallel)
    if (folder / "sizes.json").is_file():
        return list(check_preprocess(folder))
    if (folder / "cases.json").is_file():
        return list(check_tokenize(folder))
    if (folder / "greedy.json").is_file():
        return check_greedy(folder, parallel)
    if is_model_case(folder):
        return check_model_case(read_model_case(folder), parallel, recompute)
    raise ConfigError(f"{folder}: not a golden case")


def _check_own_form(
    family: ModelFamily, folder: Path, parallel: ParallelConfig, recompute: bool
) -> list[CheckResult]:
    rows: list[CheckResult] = []
    for batch in family.golden().batches(folder):
        rows += check_model_case(batch_case(folder, batch), parallel, recompute)
    rows += [*check_rows(family, folder), *check_pictures_alone(family, folder)]
    rows += check_steps(family, folder, parallel, recompute)
    return rows + check_comparisons(folder, family.golden(), parallel)
