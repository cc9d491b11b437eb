"""A folder for transformers, exported from the golden weights by the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.convert.test_conversion import TEACHER, convert
from tests.golden_dir import find_golden


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    words = ("--source", find_golden("_shared/hf_mini224"), "--teacher-model", find_golden(TEACHER))
    assert convert("import", "--target", folder / "run", *words) == 0
    words = ("--source", folder / "run", "--format", "transformers", "--tokenizer", find_golden("tokenize"))
    assert convert("export", "--target", folder / "eve", *words) == 0
    return folder / "eve"
