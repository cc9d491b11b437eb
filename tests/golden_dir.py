"""Where the golden files of the published model lie: the small ones beside the tests, the rest in GOLDEN_DIR."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_HERE = Path(__file__).resolve().parent / "golden"


def find_golden(name: str) -> Path:
    """The golden file or folder `name`, such as "tokenize"; skips the test where there is none.

    GOLDEN_DIR may be the folder of golden cases, or one that holds it as `eve` or `golden/eve`.
    """
    folders = [_HERE]
    if outside := os.environ.get("GOLDEN_DIR"):
        folders += [Path(outside) / below for below in ("golden/eve", "golden", "eve", ".")]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"golden case {name!r} is not in tests/golden nor under GOLDEN_DIR ({outside or 'not set'})")
