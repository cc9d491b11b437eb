"""Each rule of the scorers changed, one at a time: some case has to notice each change.

A mutation replaces one piece of a scorer's source; the changed copy is run as a module, and that scorer's cases on it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from tests.evaluation.case import Case, Mutation, agrees, module_path, outcome
from tests.evaluation.cases import CASES, MUTATIONS


def changed(mutation: Mutation) -> ModuleType:
    """The module with one piece of its source replaced; the real one stays as it is."""
    real = importlib.import_module(module_path(mutation.module))
    source = Path(str(real.__file__)).read_text(encoding="utf-8")
    assert source.count(mutation.old) == 1, f"{source.count(mutation.old)} times {mutation.old!r}"
    copy = ModuleType(real.__name__)
    code = compile(source.replace(mutation.old, mutation.new), f"changed {mutation.module}.py", "exec")
    exec(code, copy.__dict__)
    return copy


def failures(module: str, copy: ModuleType, cases: Sequence[Case] = CASES) -> list[str]:
    """Names of the cases of a module that a copy of it fails; an exception that is no refusal is a failure, too."""
    failed = []
    for case in (case for case in cases if case.module == module):
        try:
            right = agrees(case, outcome(case, copy))
        except Exception:  # a changed copy may raise anything
            right = False
        if not right:
            failed.append(case.name)
    return failed


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.module}: {mutation.name}")
def test_a_changed_rule_is_noticed(mutation: Mutation) -> None:
    failed = failures(mutation.module, changed(mutation))
    assert failed, "no case notices it"
    assert len(failed) < sum(case.module == mutation.module for case in CASES), "the copy does not run at all"


@pytest.mark.parametrize("module", sorted({case.module for case in CASES}))
def test_an_unchanged_copy_passes(module: str) -> None:
    first = "from __future__ import annotations\n"
    assert failures(module, changed(Mutation(module, "nothing", first, first))) == []


def test_no_change_is_there_twice() -> None:
    assert len({(each.module, each.old, each.new) for each in MUTATIONS}) == len(MUTATIONS)
    assert len({(each.module, each.name) for each in MUTATIONS}) == len(MUTATIONS)
