"""docs/adding_a_model_family.md: the code that it quotes is in the files, and its commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adding_a_model_family.md").read_text(encoding="utf-8")
QUOTES = re.findall(r"^`([\w./]+)`\n\n```\w*\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^```(?:bash|console)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_every_block_of_code_is_in_the_file_above_it() -> None:
    assert len(QUOTES) == len(re.findall(r"^```text$", PAGE, re.MULTILINE)) > 10
    for name, code in QUOTES:
        assert code in (ROOT / name).read_text(encoding="utf-8"), f"{name} does not hold:\n{code}"


def test_every_file_of_the_toy_is_in_the_table() -> None:
    files = {path.name for path in Path(__file__).with_name("toy").glob("*.py")} - {"__init__.py"}
    assert files == set(re.findall(r"^\| `tests/families/toy/(\w+\.py)`", PAGE, re.MULTILINE))


@pytest.mark.parametrize(
    ("command", "said"), [*zip(COMMANDS, ("colour loss", "captions_dataset.json"), strict=True)]
)
def test_the_commands_run(command: str, said: str, tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout + done.stderr
