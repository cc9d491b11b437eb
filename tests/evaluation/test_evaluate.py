"""tools/evaluate.py from the command line: answered, resumed, scored, and what it refuses."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.evaluation.hub_folder import write_pope
from tests.inference.test_tools import tool
from tests.test_commands import ROOT

pytest.importorskip("lmms_eval")

COUNT = 6
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_pope(folder, COUNT)
    return folder


@pytest.fixture(scope="module")
def evaluate() -> ModuleType:
    return tool("evaluate")


def words(command: str, root: Path, answers: Path, *more: Any) -> list[str]:
    found = [
        command,
        "--tasks",
        "pope",
        "--data-root",
        root,
        "--answers",
        answers,
        "--data-cache-path",
        root.parent / "cache",
    ]
    return [str(word) for word in (*found, *more)]


def asked(exported: Path) -> tuple[Any, ...]:
    return "--model-path", exported.parent / "run", "--tokenizer-model", exported / "tokenizer.model"


def answer_rows(folder: Path) -> list[dict[str, Any]]:
    """The answers of a folder, without heads, sorted."""
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    return sorted((row for row in map(json.loads, lines) if "key" in row), key=lambda row: row["key"])


def run(
    root: Path, answers: Path, *more: Any, ranks: int = 1, unshared: bool = False, **given: str
) -> subprocess.CompletedProcess[str]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    if unshared:
        start = ["unshare", "-rn", *start]
    return subprocess.run(
        [*start, ROOT / "tools" / "evaluate.py", *words("answer", root, answers, *more)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **given},
    )  # fmt: skip


def test_answered_resumed_and_scored_from_an_exported_folder(
    evaluate: ModuleType, exported: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, results = tmp_path / "answers", tmp_path / "new" / "results.json"
    model = ("--model-path", exported, "--batch-size", 2)
    scored = words("score", root, answers, "--output", results)
    assert evaluate.main(scored) == 2
    assert (
        f"--answers {answers}: no answers there; run tools/evaluate.py answer first"
        in capsys.readouterr().err
    )

    assert evaluate.main(words("answer", root, answers, *model, "--shard", "0/2")) == 0
    assert "requests  3 of shard 0/2, 3 of them without an answer" in capsys.readouterr().out
    assert evaluate.main(scored) == 2 and not results.exists()
    assert "answers are missing: pope 3; run tools/evaluate.py answer" in capsys.readouterr().err
    first = answer_rows(answers)

    # Cut otherwise: what is there is not asked again.
    assert evaluate.main(words("answer", root, answers, *model)) == 0
    assert f"requests  {COUNT} of shard 0/1, 3 of them without an answer" in capsys.readouterr().out
    assert evaluate.main(words("answer", root, answers, *model)) == 0
    assert f"{COUNT} of shard 0/1, 0 of them" in capsys.readouterr().out
    rows = answer_rows(answers)
    assert [row for row in rows if row["key"] in {one["key"] for one in first}] == first and len(
        rows
    ) == COUNT

    assert evaluate.main(scored) == 0
    table, found = capsys.readouterr().out, json.loads(results.read_text())
    said = {row["doc_id"]: row["text"].lower().strip() for row in rows}
    right = sum(said[row] == ("yes" if row % 2 else "no") for row in range(COUNT)) / COUNT
    (main,) = [one for one in found["results"] if one["main"]]
    assert (main["task"], main["metric"], main["value"], main["n"]) == ("pope", "pope_accuracy", right, COUNT)
    assert table.count("| pope |") == 5 and "**pope_accuracy**" in table
    assert found["model"]["model_path"] == str(exported) and found["errors"] == {}
    assert (
        found["versions"]["answered"] == found["versions"]["scored"]
        and "lmms_eval" in found["versions"]["scored"]
    )

    # Another template is another model.
    assert evaluate.main(words("answer", root, answers, *model, "--conv-mode", "plain")) == 2
    assert "--conv-mode vicuna_v1; name another folder" in capsys.readouterr().err


def write_damaged(root: Path) -> None:
    """POPE with three questions, one of them with a damaged picture, and one that is too long."""
    import pyarrow.parquet

    from tests.evaluation.hub_folder import write_split

    folder = write_pope(root, 3).parent.parent
    rows = pyarrow.parquet.read_table(next(folder.rglob("*.parquet"))).to_pylist()
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:50]
    rows[2]["question"] = "word " * 5000
    write_split(folder, "test", rows)


def test_a_picture_that_cannot_be_read_is_counted(
    evaluate: ModuleType, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_damaged(tmp_path / "root")
    answers, results = tmp_path / "answers", tmp_path / "results.json"
    assert evaluate.main(words("answer", tmp_path / "root", answers, "--model-path", exported)) == 3
    assert "errors    pope: image_unreadable 1, prompt_too_long 1" in capsys.readouterr().out
    assert evaluate.main(words("score", tmp_path / "root", answers, "--output", results)) == 3
    assert (
        "- pope: 2 requests without an answer, scored as wrong (image_unreadable 1, prompt_too_long 1)"
        in (capsys.readouterr().out)
    )
    assert json.loads(results.read_text())["errors"] == {
        "pope": {"image_unreadable": 1, "prompt_too_long": 1}
    }


@pytest.mark.parametrize(("more", "said"), [
    (("--shard", "8/8"), "--shard 8/8: write I/N, where I counts from 0 to N - 1"),
    (("--shard", "1"), "--shard 1: write I/N"),
    (("--tasks", "pope,mme"), "--tasks mme: --data-root {root} has no folder lmms-lab-encoder/MME: copy"),
    (("--tasks", ","), "--tasks names no task; tools/evaluate.py list shows them"),
    (("--tasks", "popee"), "--tasks popee: no such task or group; did you mean pope"),
    (("--data-root", "nowhere"), "--data-root nowhere: no such folder; name the one with the datasets"),
    (("--model-path", "nowhere"), "--model-path {here}/nowhere: neither a checkpoint"),
], ids=lambda value: "-".join(value) if isinstance(value, tuple) else "")  # fmt: skip
def test_mistakes_are_one_sentence(
    more: Sequence[str], said: str, evaluate: ModuleType, exported: Path, root: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = words("answer", root, tmp_path / "answers", "--model-path", exported, *more)
    try:
        status = evaluate.main(given)
    except SystemExit as left:
        status = left.code
    error = capsys.readouterr().err
    assert status == 2 and said.format(root=root, here=Path.cwd()) in error and "Traceback" not in error
    assert not (tmp_path / "answers").exists()


@pytest.mark.parametrize(("more", "status"), [
    (("--shard", "8/8"), 2),
    (("--ckpt-step", 77), 2),
    pytest.param((), 3, marks=pytest.mark.slow),
], ids=["flag", "checkpoint", "errors"])  # fmt: skip
def test_rank_0_writes_the_status_that_torchrun_hides(
    more: tuple[Any, ...], status: int, exported: Path, tmp_path: Path
) -> None:
    write_damaged(tmp_path / "root")
    file, split = tmp_path / "status", ("--tensor-model-parallel-size", 2)
    given = (*asked(exported), *split, *more)
    found = run(tmp_path / "root", tmp_path / "answers", *given, ranks=2, MEGATRON_EVE_STATUS_FILE=str(file))
    assert found.returncode == 1 and file.read_text() == f"{status}\n", found.stderr


def test_list_says_what_is_there(
    evaluate: ModuleType, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["list", "--data-root", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("mmlu ") and line.endswith("not found: has no folder cais/mmlu") for line in lines
    )
    assert any(line.startswith("forgetting ") and " mmlu, bbh_cot_fewshot, drop," in line for line in lines)


@pytest.mark.slow
def test_several_ranks_answer_as_one_without_a_network(exported: Path, root: Path, tmp_path: Path) -> None:
    """TP 2 against transformers on the exported folder, in a network namespace without an interface."""
    split = ("--tensor-model-parallel-size", 2)
    found = run(root, tmp_path / "two", *asked(exported), *split, ranks=2)
    assert found.returncode == 0, found.stderr
    unshared = subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0
    one = run(root, tmp_path / "one", "--model-path", exported, unshared=unshared)
    assert one.returncode == 0, one.stderr
    assert answer_rows(tmp_path / "two") == answer_rows(tmp_path / "one")
    assert len(answer_rows(tmp_path / "one")) == COUNT


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "split"), [(1, ()), (2, ("pipeline",)), (4, ("tensor", "pipeline"))])
def test_a_layout_changes_no_answer(
    ranks: int, split: Sequence[str], exported: Path, root: Path, tmp_path: Path
) -> None:
    flags = [word for name in split for word in (f"--{name}-model-parallel-size", 2)]
    found = run(root, tmp_path / "many", *asked(exported), *flags, ranks=ranks)
    assert found.returncode == 0, found.stderr
    one = run(root, tmp_path / "one", "--model-path", exported)
    assert one.returncode == 0, one.stderr
    assert answer_rows(tmp_path / "many") == answer_rows(tmp_path / "one")


@pytest.mark.slow
def test_killed_again_and_again(
    evaluate: ModuleType, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL at 20 random moments, most of them while answers are written; scoring refuses until all are there."""
    root, answers = tmp_path / "benchmarks", tmp_path / "answers"
    write_pope(root, 60)
    command = [sys.executable, ROOT / "tools" / "evaluate.py"]
    command += words("answer", root, answers, "--model-path", exported, "--batch-size", 1)
    generator, kills = random.Random(0), 0
    scored = words("score", root, answers, "--output", tmp_path / "results.json")
    while kills < 20:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, deadline = _size(answers), time.monotonic() + generator.uniform(2, 60)
        while process.poll() is None and _size(answers) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
        there = len(answer_rows(answers)) if answers.exists() else 0
        if kills % 5 == 0:
            assert evaluate.main(scored) == 2
            assert f"answers are missing: pope {60 - there};" in capsys.readouterr().err
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert evaluate.main(words("answer", root, tmp_path / "whole", "--model-path", exported)) == 0
    assert answer_rows(answers) == answer_rows(tmp_path / "whole")
    assert evaluate.main(scored) == 0


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.jsonl"))
