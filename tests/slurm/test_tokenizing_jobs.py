"""`slurm/tokenize_images.sh`: what its tasks run, and on a real Slurm with two nodes, of which one is lost."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_eve.data.format.code_part import CodePart
from tests.data.helpers import write_dataset
from tests.data.tokenizing.helpers import FAMILY, write_tower
from tests.slurm.cluster import Cluster, running, why_not
from tests.slurm.test_launch import Launch
from tools.tokenize_images import main

ROOT = Path(__file__).parents[2]
FLAGS = ("--family", FAMILY, "--micro-batch-size", "4", "--workers", "1")


def run(launch: Launch, *flags: str, **given: str) -> subprocess.CompletedProcess[str]:
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "TOWER": str(launch.folder), "OUTCOME": ""}
    return launch(script="tokenize_images", flags=flags, **task | given)


def test_every_task_runs_the_same_command(tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    found = run(launch, "--fit", "square")
    assert (found.returncode, found.stderr) == (0, "")
    assert f"== job 7_3: the codes of {tmp_path}/captions, " in found.stdout
    words = launch.words()
    assert words[words.index("tools/tokenize_images.py") :] == [
        "tools/tokenize_images.py", "--tower", str(tmp_path), "--input", f"{tmp_path}/captions", "--fit", "square",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"TOWER": ""}, "TOWER is not set: the folder of the tower. Give it before sbatch, as in TOWER=..."),
        ({"TOWER": "nowhere"}, "TOWER=nowhere: nowhere does not exist (the folder of the tower)"),
        ({"DATA": "nowhere"}, "DATA: nowhere_dataset.json does not exist; name the prefix that"),
    ],
)
def test_what_is_missing_stops_a_task(tmp_path: Path, given: dict[str, str], sentence: str) -> None:
    launch = Launch(tmp_path)
    found = run(launch, **given)
    assert found.returncode == 2 and found.stderr.startswith(f"error: {sentence}")
    assert not launch.ran


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running(Cluster(tmp_path / "cluster")) as cluster:
        yield cluster


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_tasks_share_the_work_and_a_node_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    """The bytes of one process, though the node of some tasks loses power: Slurm starts these again."""
    write_tower(tmp_path / "tower", slow=0.1)
    data = write_dataset(tmp_path / "set", 400, 0)
    (tmp_path / "cluster.env").write_text(
        f"PYTHON={sys.executable}\nCONTAINER_IMAGE=\nCONTAINER_COMMAND=()\n"
    )
    variables = {
        "CLUSTER_ENV": f"{tmp_path}/cluster.env",
        "TOWER": f"{tmp_path}/tower",
        "DATA": data,
    }
    submitted = cluster.run(
        "sbatch", "--parsable", "--array=0-3", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={tmp_path}/%a.log",
        "slurm/tokenize_images.sh", *FLAGS, env={**cluster.environment, **variables}, cwd=ROOT,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    job, folder, deadline = submitted.stdout.strip(), tmp_path / "set_codes.partial", time.monotonic() + 300
    while len(list(folder.glob("0*.json"))) < 10:
        assert time.monotonic() < deadline, [path.read_text() for path in tmp_path.glob("*.log")]
        time.sleep(0.05)
    cluster.cut_power(2)
    assert not (tmp_path / "set_codes.json").exists()
    cluster.start_node(2)
    logs = {}
    for task in range(4):
        state = cluster.wait_for(f"{job}_{task}", "COMPLETED", "FAILED", "CANCELLED", timeout=400)
        logs[task] = (tmp_path / f"{task}.log").read_text()
        assert state == "COMPLETED", logs[task]
    assert any("there already" in log or "codes below 8" in log for log in logs.values()), logs
    given = ["--tower", f"{tmp_path}/tower", "--input", data, "--output-prefix", f"{tmp_path}/one"]
    assert main([*FLAGS, *given]) == 0
    assert (tmp_path / "one_codes.bin").read_bytes() == (tmp_path / "set_codes.bin").read_bytes()
    assert CodePart(tmp_path / "one").info == CodePart(data).info
