"""docs/adding_a_model_family.md: its excerpts are in the files that it names, and its commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adding_a_model_family.md").read_text(encoding="utf-8")


def excerpts() -> list[tuple[str, str]]:
    """(file, code) of every block of Python; a block belongs to the file that was named last."""
    found, file = [], ""
    for named, language, code in re.findall(
        r"^`([\w/.]+\.py)`$|^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL
    ):
        if named:
            file = named
        elif language == "python":
            found.append((file, code))
    return found


def commands() -> list[str]:
    """The lines of every block of shell."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_every_file_of_the_toy_is_quoted() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "families" / "toy").glob("*.py")}
    assert {file for file, _ in excerpts()} == {file for file in files if not file.endswith("__init__.py")}


@pytest.mark.parametrize(
    ("file", "code"), excerpts(), ids=lambda value: value if value.endswith(".py") else ""
)
def test_an_excerpt_is_in_its_file(file: str, code: str) -> None:
    assert code in (ROOT / file).read_text(encoding="utf-8"), f"{file} does not hold\n{code}"


@pytest.mark.parametrize("command", commands())
def test_a_command_runs(command: str) -> None:
    words = command.split()
    assert words[0] == "python"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "colour loss" in done.stdout
