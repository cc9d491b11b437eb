"""`tools/compare_losses.py`: equal and different runs, wrong usage, and nothing left behind."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_eve.verification.losses import compare

ROOT = Path(__file__).parents[1]
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def _module() -> Any:
    spec = importlib.util.spec_from_file_location("compare_losses", ROOT / "tools" / "compare_losses.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_losses"] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


tool = _module()


def record(
    loss: float = 6.25, norm: float | None = 1.5, samples: str = "ab", **more: float
) -> dict[str, Any]:
    """A line of losses.jsonl, of those keys that are compared."""
    losses = {"lm_loss": loss, **more}
    hexadecimal = {f"{name}_hex": value.hex() for name, value in losses.items()}
    return {
        **losses,
        **hexadecimal,
        "grad_norm": norm,
        "sample_ids_sha256": samples,
        "seconds": time.monotonic(),
    }


def test_equal_runs_are_equal_whatever_time_they_took() -> None:
    found = compare([record(), record(5.0)], [record(), record(5.0)])
    assert (found.first, found.largest, found.text) == (None, 0.0, "equal at all 2 iterations")
    # What is not finite is null in the file.
    broken = [record(math.nan, None)]
    assert compare(broken, [record(math.nan, None)]).first is None


@pytest.mark.parametrize(
    ("other", "says", "largest"),
    [
        (
            record(math.nextafter(6.25, 7)),
            "lm loss 6.25 and 6.250000000000001 (relative difference 1.4e-16)",
            1.4e-16,
        ),
        (record(norm=3.0), "grad norm 1.5 and 3.0 (relative difference 5.0e-01)", 0.5),
        (record(math.nan), "lm loss 6.25 and nan", math.inf),
        (record(norm=None), "grad norm 1.5 and nan", math.inf),
        (record(samples="cd"), "the samples are not the same", math.inf),
        (
            record(align_loss=1.0),
            "one run has grad norm, lm loss, the other align loss, grad norm, lm loss",
            math.inf,
        ),
    ],
    ids=["last bit", "norm", "nan", "no norm", "samples", "names"],
)
def test_the_first_difference_is_told(other: dict[str, Any], says: str, largest: float) -> None:
    found = compare([record(), record()], [record(), other])
    assert found.first == 2 and found.text.startswith("differs at iteration 2: ") and says in found.text
    assert found.largest == pytest.approx(largest, rel=0.1)


def test_the_largest_difference_may_come_later() -> None:
    found = compare([record(1.0), record(1.0)], [record(1.001), record(2.0)])
    assert found.first == 1 and found.largest == 0.5 and found.text.endswith("difference 5.0e-01")


def test_a_run_that_ends_before_the_other_differs() -> None:
    found = compare([record(), record()], [record()])
    assert (
        found.first == 2
        and "one run has 2 iterations, the other 1" in found.text
        and found.largest == math.inf
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "error: required: A; see --help"),
        (("HEAD", "--steps", "0"), "--steps 0: must be 1 or more"),
        (("HEAD", "--tolerance", "2"), "--tolerance 2: must be 0 or more and below 1"),
        (("HEAD", "--tolerance", "little"), "--tolerance little: must be a number"),
        (("HEAD", "--stages", "4"), "--stages 4: must be one of 1, 2, 3"),
        (("HEAD", "--layouts", "tp9"), "--layouts tp9: must be one of tp1, tp2-sp"),
    ],
)
def test_wrong_flags(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main(words)
    assert ended.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "has no comparison.yaml; name a folder with one"),
        ("templates: [", "comparison.yaml cannot be read"),
        ("- 1", "needs templates (stage: template) and starts_with (a stage)"),
        ("{templates: {1: plain}, starts_with: 1, flags: --x}", "'--x' is not a list"),
        ("{templates: {1: plain}, starts_with: 1, flag: []}", "flag: no such setting; remove it"),
        ("{templates: {1: plain}, starts_with: 2}", "stage 2 needs a template and"),
        ("{templates: {1: plain, 2: plain}, starts_with: 1}", "stage 2 needs a template and"),
    ],
)
def test_wrong_examples(
    text: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stage1.yaml").touch()
    if text is not None:
        (tmp_path / "comparison.yaml").write_text(text)
    assert tool.main(["HEAD", "--example", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


def test_an_example_says_which_stages_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "stage7.yaml").touch()
    (tmp_path / "comparison.yaml").write_text("{templates: {7: plain}, starts_with: 7}")
    with pytest.raises(SystemExit):
        tool.main(["HEAD", "--example", str(tmp_path), "--stages", "1"])
    assert "--stages 1: must be one of 7" in capsys.readouterr().err


class Copy:
    """The repository's commands and package in a git repository of their own, with one commit."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("megatron_eve", "tools", "examples"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        self.temporary = root.parent / "temporary"
        self.temporary.mkdir()
        self.git("init", "--quiet")
        self.git("add", ".")
        person = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        self.git(*person, "commit", "--quiet", "--message", "all of it")

    def git(self, *words: str) -> str:
        done = subprocess.run(["git", *words], cwd=self.root, capture_output=True, text=True, check=True)
        return done.stdout

    def start(self, *words: str) -> subprocess.Popen[str]:
        mine = {"PYTHONPATH": str(self.root), "TMPDIR": str(self.temporary), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.Popen(
            [sys.executable, "tools/compare_losses.py", *words],
            cwd=self.root, env={**os.environ, **mine}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def left_behind(self) -> list[str]:
        """Worktrees and temporary folders that are there."""
        others = self.git("worktree", "list", "--porcelain").split("\n\n")[1:]
        # torch has a folder of its own there.
        folders = [path.name for path in self.temporary.glob("compare_losses_*")]
        return [*filter(str.strip, others), *folders]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path / "copy")


@needs_git
def test_a_commit_that_is_not_there(copy: Copy) -> None:
    for words, name in ((("nowhere",), "A"), (("HEAD", "nowhere"), "B")):
        running = copy.start(*words)
        _, errors = running.communicate(timeout=60)
        assert running.returncode == 2
        assert errors == f"error: {name}: there is no commit 'nowhere' in {copy.root}\n"
        assert not copy.left_behind()


@needs_git
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stopped_comparison_leaves_nothing(copy: Copy, number: signal.Signals) -> None:
    """Ctrl-C while it works: no worktree, no folder, no process stays."""
    running = copy.start("HEAD", "HEAD")
    process = psutil.Process(running.pid)
    deadline = time.monotonic() + 60
    started: list[psutil.Process] = []
    while not started:
        assert time.monotonic() < deadline and running.poll() is None
        # The first command in a worktree; what git does comes before.
        with contextlib.suppress(psutil.NoSuchProcess):
            started = [child for child in process.children() if "-c" in child.cmdline()]
    assert len(copy.left_behind()) == 3  # two worktrees in a folder
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == (130 if number == signal.SIGINT else 143), errors
    assert "Traceback" not in errors
    assert not copy.left_behind()
    assert not psutil.wait_procs(started, timeout=5)[1]


@needs_git
@pytest.mark.slow
def test_the_same_code_is_equal_and_a_changed_constant_differs(copy: Copy) -> None:
    pytest.importorskip("skimage")
    short = ("--stages", "2", "--layouts", "tp1", "--steps", "2")
    same = copy.start("HEAD", "HEAD", *short)
    output, errors = same.communicate(timeout=500)
    assert same.returncode == 0, output + errors
    assert "2      tp1       equal at all 2 iterations" in output
    constant = "align_loss_weight: float = 1.0"
    files = [path for path in (copy.root / "megatron_eve").rglob("*.py") if constant in path.read_text()]
    assert files
    for file in files:
        file.write_text(file.read_text().replace(constant, "align_loss_weight: float = 0.5"))
    changed = copy.start("HEAD", *short)  # against the files as they are
    output, errors = changed.communicate(timeout=500)
    assert changed.returncode == 1, output + errors
    assert "2      tp1       differs at iteration 1: grad norm" in output
    assert not copy.left_behind()


@needs_git
@pytest.mark.slow
def test_a_run_that_fails_is_told_and_counts(copy: Copy) -> None:
    pytest.importorskip("skimage")
    recipe = copy.root / "examples" / "eve_tiny" / "stage3.yaml"
    recipe.write_text(recipe.read_text().replace("seq_length", "sequence_length"))
    running = copy.start("HEAD", "--stages", "3", "--layouts", "tp1", "--steps", "1")
    output, errors = running.communicate(timeout=500)
    assert running.returncode == 1, output + errors
    assert "3      tp1       failed. B: the command ended with status 2:" in output
    assert "sequence_length: no such setting" in output
    assert not copy.left_behind()
