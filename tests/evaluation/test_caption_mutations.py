"""Each rule of captions, of their scorer and of their tasks, changed, one at a time: some case has to notice it."""

from __future__ import annotations

import importlib
import shutil

import pytest

from tests.evaluation.case import Case, Mutation, agrees, module_path, outcome
from tests.evaluation.cases_captions import CASES, MUTATIONS, SCORER
from tests.evaluation.test_mutations import changed, failures

pytestmark = pytest.mark.skipif(shutil.which("java") is None, reason="no java: captions are not scored")
pytest.importorskip("datasets")
pytest.importorskip("pycocoevalcap")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.module}: {case.name}")
def test_case(case: Case) -> None:
    found = outcome(case, importlib.import_module(module_path(case.module)))
    assert agrees(case, found), f"{found!r} instead of {case.expected!r}"


@pytest.mark.parametrize("mutation", [
    # Each change of the scorer starts java several times.
    pytest.param(one, id=f"{one.module}: {one.name}", marks=[pytest.mark.slow] * (one.module == SCORER))
    for one in MUTATIONS
])  # fmt: skip
def test_a_changed_rule_is_noticed(mutation: Mutation) -> None:
    failed = failures(mutation.module, changed(mutation), CASES)
    assert failed, "no case notices it"
    assert len(failed) < sum(case.module == mutation.module for case in CASES), "the copy does not run at all"
