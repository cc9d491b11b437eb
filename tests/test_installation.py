"""What `make` installs for whom, its progress while it does, and what `make clean` deletes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.pip_install import install, size_of

ROOT = Path(__file__).resolve().parents[1]
# `make test` hands its own variables to the make of these tests, which would then name the folders it enters.
WITHOUT_MAKE = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def would_run(target: str, venv: Path, *more: str) -> list[str]:
    """The commands of a target, as `make --dry-run` lists them."""
    command = ["make", "--dry-run", target, *more, f"VENV={venv}", f"PYTHON={sys.executable}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=WITHOUT_MAKE)
    return found.stdout.splitlines()


def extras(lines: list[str]) -> list[str]:
    """The extras of the package that these commands install, in order."""
    return re.findall(r"pip_install\.py .*--editable '\.\[([\w,]+)\]'", "\n".join(lines))


@needs_make
class TestTargets:
    """Which extras a command installs."""

    @pytest.mark.parametrize("target", ["install", "quickstart"])
    def test_a_user_gets_nothing_for_tests_gpus_or_browsers(self, target: str, tmp_path: Path) -> None:
        assert extras(would_run(target, tmp_path / "venv")) == ["quickstart"]

    @pytest.mark.parametrize("target", ["install-dev", "test", "test-slow", "lint", "format"])
    def test_what_tests_and_linters_need_comes_with_them(self, target: str, tmp_path: Path) -> None:
        lines = would_run(target, tmp_path / "venv")
        assert extras(lines) == ["quickstart", "eval", "curate", "dev,chat,dali"]
        torch = next(number for number, line in enumerate(lines) if " torch==" in line)
        assert torch < next(number for number, line in enumerate(lines) if "--editable" in line)

    def test_one_after_the_other_adds_and_never_repeats(self, tmp_path: Path) -> None:
        venv = tmp_path / "venv"
        venv.mkdir()
        (venv / "flavour").write_text("cpu\n")
        (venv / "installed").touch()
        assert extras(would_run("install", venv)) == []
        assert extras(would_run("install-eval", venv)) == ["eval"]
        assert extras(would_run("install-curate", venv)) == ["curate"]
        (venv / "installed-eval").touch()
        (venv / "installed-curate").touch()
        assert extras(would_run("install-dev", venv)) == ["dev,chat,dali"]
        (venv / "installed-dev").touch()
        for target in ("install", "install-eval", "install-curate", "install-dev", "test"):
            assert extras(would_run(target, venv)) == []

    def test_lmms_eval_comes_without_what_it_asks_for(self, tmp_path: Path) -> None:
        lines = would_run("install-eval", tmp_path / "venv")
        (line,) = [line for line in lines if line.endswith(" lmms-eval")]
        assert " --no-deps " in line and " --constraint constraints/eval.txt " in line

    def test_an_environment_for_gpus_keeps_its_own_dali(self, tmp_path: Path) -> None:
        venv = tmp_path / "venv"
        venv.mkdir()
        (venv / "flavour").write_text("cu12\n")
        (venv / "installed").touch()
        lines = would_run("test", venv)
        assert extras(lines) == ["eval", "curate", "dev,chat"]
        assert "--constraint constraints/cu12.txt" in "\n".join(lines)

    @pytest.mark.parametrize("cuda", ["12", "13"])
    def test_the_installation_for_gpus_has_dali_of_its_cuda(self, cuda: str, tmp_path: Path) -> None:
        lines = would_run("install-gpu", tmp_path / "venv", f"CUDA={cuda}")
        assert any(line.endswith(f" nvidia-dali-cuda{cuda}0") for line in lines)
        assert extras(lines) == ["quickstart"]
        assert f"--constraint constraints/cu{cuda}.txt" in "\n".join(lines)


@needs_make
def test_clean_deletes_only_what_was_made_here(tmp_path: Path) -> None:
    """In a copy of what it needs: first with a user's folders under the same names, then with the project's own."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "examples" / "quickstart").mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "quickstart" / "folder.py", tmp_path / "examples" / "quickstart")
    for name in ("megatron_eve", "tools", "tests", "benchmarks"):
        (tmp_path / name / "__pycache__").mkdir(parents=True)
    mine = [tmp_path / folder / "mine" for folder in (".venv", "quickstart", "build", "dist")]
    for path in mine:
        path.parent.mkdir()
        path.touch()
    command = ["make", "clean", f"PYTHON={sys.executable}"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=WITHOUT_MAKE)
    assert found.returncode == 0 and all(path.exists() for path in mine)
    assert found.stderr.splitlines() == [
        "quickstart holds files that the quickstart did not make, so it stays as it is: delete it yourself if it is "
        "not needed",
        ".venv was not made by make install, so it stays as it is: delete it yourself if it is not needed",
    ]
    assert not list(tmp_path.rglob("__pycache__"))

    for path in mine:
        path.unlink()
    (tmp_path / ".venv" / ".megatron_eve").touch()
    (tmp_path / "quickstart" / ".megatron_eve_quickstart").touch()
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=WITHOUT_MAKE)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert not any(path.parent.exists() for path in mine)


class TestProgress:
    """`tools/pip_install.py` on commands in the place of pip."""

    def test_lines_while_it_works_and_no_output_of_a_success(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        script = "import time; print('Collecting torch', flush=True); time.sleep(2)"
        (tmp_path / "wheel").write_bytes(bytes(100_000_000))
        assert install([sys.executable, "-c", script], tmp_path, every=0.5) == 0
        out, err = capsys.readouterr()
        assert err == ""
        lines = out.splitlines()
        assert lines[-1] == "    0 min, 0.1 GB so far: Collecting torch"

    def test_a_failure_shows_what_pip_said_last(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        script = "[print('line', i) for i in range(50)]; raise SystemExit('ERROR: no such version')"
        assert install([sys.executable, "-c", script], tmp_path) == 1
        out, err = capsys.readouterr()
        assert out == "" and "ERROR: no such version" in err
        assert "line 49" in err and "line 10" not in err

    def test_the_size_counts_files_and_not_what_links_point_to(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "file").write_bytes(bytes(1000))
        (tmp_path / "link").symlink_to("folder/file")
        assert size_of(tmp_path) == 1000 + len("folder/file")
