"""What `slurm/launch.sh` hands to srun: recipes, and the same command with and without a container. Needs no Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = "examples/eve_7b/stage2.yaml"
LAYOUT = "examples/eve_7b/layouts/h100.yaml"
# srun that writes down its words, and where it was called with what for users' packages; its run is done at once.
SRUN = 'printf "%s\\n" "$PWD" "${PYTHONNOUSERSITE:-}" "$@" > "$RECORD"\necho done > "$SAVE/outcome"\n'


class Launch:
    """A batch script run by hand, with programs of Slurm that do nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, body in (("srun", SRUN), ("scontrol", "echo node1\n")):
            (folder / name).write_text(f"#!/bin/bash\n{body}")
            (folder / name).chmod(0o755)

    def __call__(self, site: str = "", **given: str) -> subprocess.CompletedProcess[str]:
        """Run stage 2, with lines of the site's settings and variables."""
        settings = self.folder / "cluster.env"
        empty = "PYTHON=\nNETWORK_INTERFACE=\nCONTAINER_IMAGE=\nCONTAINER_MOUNTS=\nCONTAINER_COMMAND=()\n"
        settings.write_text(f"{empty}{site}\n")
        environment = {
            "PATH": f"{self.folder}:{os.environ['PATH']}", "RECORD": str(self.folder / "record"),
            "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "test", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node[1-2]", "CLUSTER_ENV": str(settings),
            "DATA": "data/captions", "TEACHER": str(self.folder), "LOAD": str(self.folder),
            "SAVE": str(self.folder / "run"), **given,
        }  # fmt: skip
        return subprocess.run(
            ["bash", "slurm/pretrain_stage2.sh", "--bf16"],
            env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def words(self) -> list[str]:
        """What srun was given, behind the two words about its surroundings."""
        return (self.folder / "record").read_text().splitlines()


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    return Launch(tmp_path)


def _command(words: list[str]) -> list[str]:
    """The command of a node: what stands behind the name that `bash -c` gives it."""
    return words[words.index("node") + 1 :]


def test_a_layout_stands_behind_the_recipe(launch: Launch) -> None:
    assert launch(f"PYTHON={sys.executable}").returncode == 0
    without = launch.words()
    found = launch(f"PYTHON={sys.executable}", LAYOUT=LAYOUT)
    assert found.returncode == 0, found.stderr
    words = launch.words()
    at = words.index("--config")
    assert words[at : at + 4] == ["--config", RECIPE, LAYOUT, "--save"]
    assert [word for word in words if word != LAYOUT] == without
    assert f"--config {RECIPE} {LAYOUT} --save" in found.stdout  # the plan says so


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"LAYOUT": "none.yaml"}, f"error: the layout none.yaml does not exist in {ROOT}"),
        ({"RECIPE": "none.yaml", "LAYOUT": LAYOUT}, f"error: the recipe none.yaml does not exist in {ROOT}"),
    ],
)
def test_a_file_that_is_missing_stops_before_srun(
    launch: Launch, given: dict[str, str], message: str
) -> None:
    found = launch(f"PYTHON={sys.executable}", **given)
    assert found.returncode == 2
    assert found.stderr.strip() == message
    assert not (launch.folder / "record").exists()


def test_without_a_container(launch: Launch) -> None:
    assert launch(f"PYTHON={sys.executable}").returncode == 0
    words = launch.words()
    assert words[:2] == [str(ROOT), ""]
    assert not [word for word in words if word.startswith("--container")]
    assert _command(words)[0] == sys.executable
    found = launch("PYTHON=nowhere")
    assert found.returncode == 2
    assert "PYTHON=nowhere is not there: make install-gpu" in found.stderr


def test_with_pyxis(launch: Launch) -> None:
    """The checkout is mounted and entered, and Python is the image's."""
    found = launch("CONTAINER_IMAGE=/images/eve.sqsh\nCONTAINER_MOUNTS=/data:/data")
    assert found.returncode == 0, found.stderr
    words = launch.words()
    assert words[1] == "1"
    options = [word for word in words if word.startswith("--container")]
    assert options == [
        "--container-image=/images/eve.sqsh",
        f"--container-workdir={ROOT}",
        f"--container-mounts={ROOT}:{ROOT},/data:/data",
    ]
    assert _command(words)[:3] == ["python3", "-m", "torch.distributed.run"]
    launch("CONTAINER_IMAGE=eve\nPYTHON=/usr/bin/python3.12")
    words = launch.words()
    assert f"--container-mounts={ROOT}:{ROOT}" in words
    assert _command(words)[0] == "/usr/bin/python3.12"


def test_with_a_command_such_as_apptainer(launch: Launch) -> None:
    found = launch('CONTAINER_COMMAND=(apptainer exec --nv --bind "$PWD" eve.sif)')
    assert found.returncode == 0, found.stderr
    words = launch.words()
    assert words[1] == "1"
    assert not [word for word in words if word.startswith("--container")]
    start = [
        "apptainer",
        "exec",
        "--nv",
        "--bind",
        str(ROOT),
        "eve.sif",
        "python3",
        "-m",
        "torch.distributed.run",
    ]
    assert _command(words)[: len(start)] == start
