"""The quickstart, and what the other examples share with it; the whole of it in `make test-slow`."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(QUICKSTART))
    return importlib.import_module("launch")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(QUICKSTART))
    return importlib.import_module("folder")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("skimage")
    monkeypatch.syspath_prepend(str(QUICKSTART))
    return importlib.import_module("run")


def losses(*values: float) -> list[dict[str, object]]:
    return [{"iteration": i, "lm_loss_hex": value.hex()} for i, value in enumerate(values, start=1)]


def test_kill_reaches_grandchildren_in_sessions_of_their_own(launch: ModuleType, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    parent = (
        "import subprocess, sys; "
        f"subprocess.run([sys.executable, '-c', {child!r}, sys.argv[1]], start_new_session=True)"
    )
    with launch.Command([sys.executable, "-c", parent, str(note)], tmp_path / "log") as running:
        deadline = time.monotonic() + 30
        while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        grandchild = int(note.read_text())
        assert running.running and psutil.pid_exists(grandchild)
        assert running.kill() == 2
        assert not running.running and not psutil.pid_exists(grandchild)


def test_a_failing_command_shows_its_own_words_not_those_of_torchrun(
    launch: ModuleType, tmp_path: Path
) -> None:
    script = "print('the cause'); print('E1 torch/distributed/elastic: rank 0 failed'); raise SystemExit(3)"
    with (
        launch.Command([sys.executable, "-c", script], tmp_path / "log") as running,
        pytest.raises(launch.StepFailed, match=r"status 3.*\n.*the cause$"),
    ):
        running.wait()


def test_follow_leaves_out_a_line_cut_off_by_a_kill(launch: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    path.write_text('{"iteration": 1}\n{"iterat')
    assert launch.read_records(path) == [{"iteration": 1}]
    assert launch.read_records(tmp_path / "none.jsonl") == []


def test_losses_must_be_equal_at_every_iteration(run: ModuleType) -> None:
    reference = losses(3.0, 2.0, 1.0)
    run.require_same_losses(reference, [*losses(3.0, 2.0), *losses(3.0, 2.0, 1.0)[1:]], 3)
    with pytest.raises(run.StepFailed, match="iteration 3: the losses are"):
        run.require_same_losses(reference, losses(3.0, 2.0, 1.0 + 2**-52), 3)
    # Before the kill, though mended after it.
    with pytest.raises(run.StepFailed, match="iteration 2: the losses are"):
        run.require_same_losses(reference, [*losses(3.0, 2.5), *losses(3.0, 2.0, 1.0)[1:]], 3)
    with pytest.raises(run.StepFailed, match="no loss was recorded for iteration 3"):
        run.require_same_losses(reference, losses(3.0, 2.0), 3)


def start(script: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / script), *words]
    environment = {**os.environ, **more}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize(
    "script",
    [
        "quickstart/run.py",
        "vila_tiny/run.py",
        "vila_u_tiny/run.py",
        "vila_u_tiny/tower.py",
        "eve2_tiny/run.py",
        "curation_tiny/run.py",
    ],
)
def test_a_folder_that_is_not_its_own_is_refused(script: str, tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    (tmp_path / "thesis.tex").write_text("mine")
    found = start(script, "--output", str(tmp_path))
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr == (
        f"error: {tmp_path} holds files that the quickstart did not make, so it stays as it is: move it away, or "
        "choose another folder with --output\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_recipe_that_saves_too_late_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    recipe, output = tmp_path / "late.yaml", tmp_path / "quickstart"
    recipe.write_text("preset: eve_tiny\ntraining:\n  train_iters: 20\ncheckpoint:\n  save_interval: 20\n")
    found = start("quickstart/run.py", "--output", str(output), "--config", str(recipe))
    assert found.returncode == 2 and found.stdout == "" and not output.exists()
    assert found.stderr == (
        f"error: --config {recipe}: must save before the middle of the run, where it is killed; set "
        "checkpoint.save_interval to 10 or less\n"
    )


@pytest.mark.parametrize(
    ("script", "package", "command"),
    [
        ("quickstart/run.py", "matplotlib", "make quickstart"),
        ("quickstart/run.py", "skimage", "make quickstart"),
        ("vila_tiny/text_experiment.py", "matplotlib", "make vila"),
        ("eve2_tiny/text_experiment.py", "skimage", "make quickstart"),
        ("vila_u_tiny/run.py", "matplotlib", "make vila-u"),
        ("vila_u_tiny/tower.py", "skimage", "make vila-u-tower"),
        ("curation_tiny/run.py", "datatrove", "make curation"),
    ],
)
def test_a_package_that_is_missing_is_named_at_once(
    script: str, package: str, command: str, tmp_path: Path
) -> None:
    """Nothing is written before; None in sys.modules is how Python itself blocks an import."""
    pytest.importorskip("skimage")
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, package=None: None if name == {package!r} else find(name, package)\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    output = tmp_path / "quickstart"
    search = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    found = start(script, "--output", str(output), PYTHONPATH=search)
    assert found.returncode == 2 and not output.exists()
    extras = "quickstart,curate" if script == "curation_tiny/run.py" else "quickstart"
    assert found.stderr == (
        f"error: {package} is not installed: {command} installs it, or pip install '.[{extras}]'\n"
    )


class TestFolder:
    """Clearing deletes what the quickstart made, and nothing else."""

    def test_what_a_user_put_beside_stays(self, folder: ModuleType, tmp_path: Path) -> None:
        output = tmp_path / "quickstart"
        folder.prepare(output)
        for name in folder.MADE:
            (output / name).mkdir()
            (output / name / "file").touch()
        (output / "walk").mkdir()
        (output / "walk" / "model").write_text("mine")
        folder.prepare(output)
        assert {path.name for path in output.iterdir()} == {folder.MARKER, "walk"}
        folder.clear(output)
        assert [path.name for path in output.rglob("*")] == ["walk", "model"]
        with pytest.raises(folder.NotOurs, match="did not make"):
            folder.prepare(output)

    def test_nothing_is_left_where_all_was_its_own(self, folder: ModuleType, tmp_path: Path) -> None:
        folder.prepare(tmp_path / "quickstart")
        folder.clear(tmp_path / "quickstart")
        folder.clear(tmp_path / "quickstart")
        assert list(tmp_path.iterdir()) == []

    def test_a_link_is_not_followed(self, folder: ModuleType, tmp_path: Path) -> None:
        disk, output = tmp_path / "disk", tmp_path / "quickstart"
        disk.mkdir()
        (disk / "file").touch()
        folder.prepare(output)
        (output / "data").symlink_to(disk)
        folder.clear(output)
        assert (disk / "file").exists() and not output.exists()
        output.symlink_to(disk)
        with pytest.raises(folder.NotOurs, match="is not a folder that the quickstart made"):
            folder.clear(output)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_the_whole_quickstart(folder: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "quickstart"
    command = [sys.executable, str(QUICKSTART / "run.py"), "--output", str(output)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "losses equal bit for bit" in found.stdout and "3 of 3" in found.stdout
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    reference = [
        json.loads(line) for line in (output / "reference" / "losses.jsonl").read_text().splitlines()
    ]
    assert {path.name for path in output.iterdir()} <= {folder.MARKER, *folder.MADE}
    assert reference[-1]["lm_loss"] < 0.1 * reference[0]["lm_loss"]
