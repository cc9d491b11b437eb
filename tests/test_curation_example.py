"""The toy walk through curation, from end to end in `make test-slow`, and what its checks notice."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("skimage")
    for folder in (EXAMPLES / "quickstart", EXAMPLES):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("curation_tiny.checks")


def test_a_row_of_another_fate_is_named(checks: ModuleType) -> None:
    rows = [
        checks.Row("laion", "a", "coffee", b"", "padded"),
        checks.Row("laion", "b", "coffee", b""),
        checks.Row("laion", "c", "coffee", None, checks.FAILED),
    ]
    found = {("laion", "a"): "padded", ("laion", "b"): checks.GOOD}
    assert checks.check_fates(rows, found) == {"padded": 1, checks.GOOD: 1, checks.FAILED: 1}
    found["laion", "b"] = "duplicate_near"
    with pytest.raises(
        checks.StepFailed, match=r"1 of 3 rows .*: laion b \(coffee\): duplicate_near, not good"
    ):
        checks.check_fates(rows, found)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(3600)
def test_the_whole_walk(tmp_path: Path) -> None:
    output = tmp_path / "curation"
    command = [sys.executable, str(EXAMPLES / "curation_tiny" / "run.py"), "--output", str(output)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "all 35 bad rows were dropped for their reasons, and no other row" in found.stdout
    assert "killed with " in found.stdout
    for page in (
        "filter/dropped.html",
        "duplicates/duplicates.html",
        "select/index.html",
        "caption/index.html",
    ):
        assert (output / "work" / page).exists(), page
