"""Which folders are golden cases. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from megatron_eve.models.family import ModelFamily
from megatron_eve.models.golden_format import GoldenFormat
from megatron_eve.models.registry import code_families, find_image_codes, loaded_families

CASE_FILES = ("inputs.safetensors beside meta.json", "sizes.json", "cases.json", "greedy.json")
"""What a case of the shared form holds, for messages: one of these."""


def is_case(folder: Path) -> bool:
    """Is it a case of the shared form, or of a family's own?"""
    return (
        is_model_case(folder)
        or any((folder / name).is_file() for name in CASE_FILES[1:])
        or (reading_family(folder) is not None)
        or (tower_golden(folder) is not None)
    )


def is_model_case(folder: Path) -> bool:
    """Is it a model case of the shared form?"""
    return all((folder / name).is_file() for name in ("meta.json", "inputs.safetensors"))


def reading_family(folder: Path) -> ModelFamily | None:
    """The family that reads this folder as a case of its own form; None where it is none."""
    return next((family for family in loaded_families() if family.golden().reads(folder)), None)


def tower_golden(folder: Path) -> GoldenFormat | None:
    """What reads this folder as a case of towers that make codes of pictures; None where it is none."""
    formats = (find_image_codes(name).golden for name in code_families())
    return next((one for one in formats if one is not None and one.reads(folder)), None)
