"""What preflight and preprocessing open and read without torch and megatron-core, which take seconds to import."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "text.tokenizer",
        "text.conversation",
        "preprocessing.preprocess",
        "images",
        "format.indexed",
        "opening",
    ],
)
def test_modules_load_without_torch_or_megatron(module: str) -> None:
    code = f"import sys, megatron_eve.data.{module}; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
