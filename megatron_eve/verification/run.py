"""Selects the check for a golden folder."""

from __future__ import annotations

from pathlib import Path

from megatron_eve.config import ParallelConfig
from megatron_eve.verification.cases import check_preprocess, check_tokenize
from megatron_eve.verification.model_cases import check_greedy, check_model_case
from megatron_eve.verification.results import CheckResult


def check_folder(folder: Path, parallel: ParallelConfig, recompute: bool = False) -> list[CheckResult]:
    """All rows of one golden folder under a layout; the process group must exist. Collective.

    Args:
        folder: the case.
        parallel: the layout.
        recompute: run model cases with full recomputation.

    Raises:
        FileNotFoundError: the folder is of no known form.
    """
    if (folder / "sizes.json").is_file():
        return list(check_preprocess(folder))
    if (folder / "cases.json").is_file():
        return list(check_tokenize(folder))
    if (folder / "greedy.json").is_file():
        return check_greedy(folder, parallel)
    if (folder / "meta.json").is_file():
        return check_model_case(folder, parallel, recompute)
    raise FileNotFoundError(f"{folder}: not a golden case")
