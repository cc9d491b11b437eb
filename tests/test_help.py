"""The `--help` of every command: readable at 80 and at 160 columns, and its examples are right."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.curation.preparing.registry import PREPARERS

ROOT = Path(__file__).parents[1]
COLUMNS = (80, 160)
# Commands that load no torch for their pages, so that these come at once.
FAST = [
    ["megatron_eve.pretrain"],
    ["megatron_eve.train_tower"],
    ["megatron_eve.preflight"],
    *(
        [str(path.relative_to(ROOT))]
        for path in sorted((ROOT / "tools").glob("*.py"))
        if path.stem != "pip_install"  # the Makefile's own; its words are pip's
    ),
    ["tools/convert_checkpoint.py", "import"],
    ["tools/convert_checkpoint.py", "export"],
    *(["tools/prepare_data.py", name] for name in PREPARERS),
    ["examples/toy_teacher.py"],
    ["examples/quickstart/run.py"],
]
BENCHMARKS = [
    [str(path.relative_to(ROOT))]
    for path in sorted((ROOT / "benchmarks").glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
]
# What a page of defaults that nobody described looks like.
UNREADABLE = re.compile(
    r"\{None|None[|}]|\(default: \)|\(default: None\)|\(default: unset\)|==SUPPRESS==|%\(|\[\]"
)


def drive(jobs: list[tuple[list[str], int]]) -> list[dict[str, Any]]:
    """What comes of commands, each at a width of the terminal."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.help_driver"],
        input=json.dumps([{"command": command, "columns": columns} for command, columns in jobs]),
        capture_output=True, text=True, timeout=280, cwd=ROOT, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def problems_of(page: str, columns: int) -> list[str]:
    """What is wrong with a page."""
    lines = page.splitlines()
    found = [f"wider than {columns}: {line}" for line in lines if len(line) > columns]
    found += [f"unreadable: {line}" for line in lines if UNREADABLE.search(line)]
    if not any(re.fullmatch("examples?:", line) for line in lines[:6]):
        found.append(f"no example near the top: {lines[:6]}")
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        # A flag and its text, which may begin on the next line.
        flag = re.fullmatch(r"  (-\S+(?: / -\S+|, -\S+)*(?: \S+)*)(?:\s{2,}(\S.*))?", line)
        if flag and not flag[2] and not re.match(r" {20,}\S", below):
            found.append(f"without a text: {line}")
    for entry in re.split(r"\n(?=  -)", page):
        if entry.count("(default:") > 1:
            found.append(f"two defaults: {entry}")
    return found


def examples_of(page: str) -> list[list[str]]:
    """The command lines at the top of a page: a script's path or a module's name, and its words."""
    block = re.search(r"^examples?:\n(.*?)\n\n", page, re.DOTALL | re.MULTILINE)
    assert block is not None, page
    found = []
    for line in block[1].replace("\\\n", " ").splitlines():
        words = shlex.split(line.split(" | ")[-1])
        name = words.index("-m") + 1 if "-m" in words else next(
            (i for i, word in enumerate(words) if word.endswith(".py")), None
        )  # fmt: skip
        if name is not None:  # not `make quickstart`
            found.append(words[name:])
    return found


def check_pages(commands: list[list[str]], torch: bool) -> None:
    pages = [([*command, "--help"], columns) for command in commands for columns in COLUMNS]
    found, wrong = drive(pages), []
    examples: list[list[str]] = []
    for (command, columns), page in zip(pages, found, strict=True):
        said = problems_of(page["out"], columns)
        if page["status"] not in (0, None) or (
            page["err"] and not torch
        ):  # megatron-core warns when it is imported
            said.append(f"status {page['status']}: {page['err']}")
        if page["torch"] and not torch:
            said.append("torch was loaded")
        wrong += [f"{' '.join(command)} at {columns} columns: {one}" for one in said]
        of_page = examples_of(page["out"]) if not said else []
        if not said and not of_page:
            wrong.append(f"{' '.join(command)}: no example is a command")
        examples += [one for one in of_page if one not in examples]
    assert not wrong, "\n".join(wrong)
    for example, read in zip(examples, drive([(one, 80) for one in examples]), strict=True):
        if read["status"] not in (0, None):
            wrong.append(f"the example {' '.join(example)}: {read['err']}")
    assert not wrong, "\n".join(wrong)


def test_pages_and_examples_of_the_commands() -> None:
    check_pages(FAST, torch=False)


@pytest.mark.slow
def test_pages_and_examples_of_the_benchmarks() -> None:
    check_pages(BENCHMARKS, torch=True)


def test_the_first_examples_of_pretrain_can_run() -> None:
    """They need nothing but the repository."""
    ((_, *first), (_, *second)) = [
        one
        for one in examples_of(drive([(["megatron_eve.pretrain", "--help"], 80)])[0]["out"])
        if "--help" not in one
    ]
    for words, ranks in ((first, "1"), (second, "2")):
        done = subprocess.run(
            [sys.executable, "-m", "megatron_eve.preflight", "--ranks", ranks, *words],
            capture_output=True, text=True, timeout=60, cwd=ROOT, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")


def test_each_group_of_pretrain_begins_with_a_sentence() -> None:
    (page,) = drive([(["megatron_eve.pretrain", "--help"], 160)])
    groups = re.findall(r"^(\w+):\n(.*)\n\n  --", page["out"], re.MULTILINE)
    assert [name for name, _ in groups] == [
        "configuration", "model", "vision", "parallel", "training", "lora", "optimizer", "data", "checkpoint", "faults",
        "logging",
    ]  # fmt: skip
    assert all(re.fullmatch(r"  [A-Z].*[a-z)]\.", sentence) for _, sentence in groups), groups


def test_the_page_of_towers_has_no_flags_of_decoders() -> None:
    (page,) = drive([(["megatron_eve.train_tower", "--help"], 160)])
    groups = re.findall(r"^(\w+):\n(.*)\n\n  --", page["out"], re.MULTILINE)
    assert [name for name, _ in groups] == [
        "configuration", "vision", "parallel", "training", "optimizer", "data", "checkpoint", "faults", "logging",
    ]  # fmt: skip
    shown = set(re.findall(r"^  (--[a-z0-9-]+)", page["out"], re.MULTILINE))
    assert {"--vision-tower", "--global-batch-size", "--load", "--eval-interval", "--adam-beta1"} <= shown
    assert not shown & {
        "--tensor-model-parallel-size",
        "--num-layers",
        "--lora-rank",
        "--seq-length",
        "--stage",
    }
