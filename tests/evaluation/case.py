"""What the cases of the scorers are made of; the cases themselves stand in `cases_*.py`, one for each scorer's module.

A case calls a scorer's module, which is an argument, so that the same cases run on the module as it is
(`test_scorers.py`) and on changed copies of it (`test_mutations.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from megatron_eve.data.errors import DataError

SCORERS = "megatron_eve.evaluation.scorers"


def module_path(module: str) -> str:
    """The name by which a module of cases is imported: of one of the scorers, or below `evaluation` with a dot."""
    return f"megatron_eve.evaluation.{module}" if "." in module else f"{SCORERS}.{module}"


@dataclass(frozen=True)
class Refused:
    """The outcome of a case whose input is refused: a `DataError` whose message matches this pattern."""

    pattern: str


@dataclass(frozen=True)
class Case:
    """A call of a module's function and what comes out of it; floats are compared to 1e-9."""

    module: str
    name: str
    call: Callable[[ModuleType], Any]
    expected: Any


@dataclass(frozen=True)
class Mutation:
    """A rule of a module changed: what that does, a text that its source has once, and what stands there instead."""

    module: str
    name: str
    old: str
    new: str


def outcome(case: Case, module: ModuleType) -> Any:
    """What a case gives; the message of a refusal where one is expected or where it comes."""
    try:
        return case.call(module)
    except DataError as error:
        return Refused(str(error))


def agrees(case: Case, found: Any) -> bool:
    """Whether an outcome is the expected one."""
    if isinstance(case.expected, Refused):
        one_sentence = isinstance(found, Refused) and "\n" not in found.pattern
        return one_sentence and re.search(case.expected.pattern, found.pattern) is not None
    return _same(found, case.expected)


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, float):
        return isinstance(found, float | int) and abs(found - expected) < 1e-9
    if isinstance(expected, tuple):
        pairs = isinstance(found, tuple) and len(found) == len(expected)
        return pairs and all(_same(a, b) for a, b in zip(found, expected, strict=True))
    return type(found) is type(expected) and found == expected
