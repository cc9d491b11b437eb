"""`slurm/curate.sh` on a real Slurm with two nodes: stages that wait for each other, killed tasks, a lost node."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from pyarrow import parquet

from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.parquet import write_records
from tests.data.helpers import encoded, picture
from tests.slurm.cluster import Cluster, running, why_not

ROOT = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
PARTIAL = {"duplicates": "00000.parquet", "centres": "centres.npy", "select": "00000.parquet"}
"""The file in whose writing the one task of these stages is killed."""

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]


class Site:
    """A work folder on the cluster, and what the script makes of it."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.work = cluster, folder, folder / "work"
        (folder / "cluster.env").write_text(
            f"PYTHON={sys.executable}\nCONTAINER_IMAGE=\nCONTAINER_COMMAND=()\n"
        )

    def call(self, script: str = "curate", *flags: str, **given: str) -> subprocess.CompletedProcess[str]:
        """Call a script as a user does, in the root of the checkout."""
        variables = {
            "CLUSTER_ENV": f"{self.folder}/cluster.env", "WORK": str(self.work), "SHARDS_PER_TASK": "1",
            "SBATCH_CPUS_PER_TASK": "1", **given,
        }  # fmt: skip
        return self.cluster.run(
            "bash", f"slurm/{script}.sh", *flags, env={**self.cluster.environment, **variables}, cwd=ROOT
        )

    def submit(self, lines: Sequence[str], **given: str) -> dict[str, tuple[str, str]]:
        """Submit stages; of each the job's number and the shards, those that are finished left out."""
        stages = self.folder / "stages.txt"
        stages.write_text("\n".join(lines))
        found = self.call(STAGES=str(stages), **given)
        assert found.returncode == 0, found.stderr
        told = re.findall(r"^== (\w+): (?:job (\d+), shards (\S+) in|finished)", found.stdout, re.MULTILINE)
        assert len(told) == len(lines), found.stdout
        return {stage: (job, shards) for stage, job, shards in told if job}

    def ended(self, job: str, tasks: Sequence[int]) -> list[str]:
        """Wait for tasks; how they ended."""
        return [self.cluster.wait_for(f"{job}_{task}", *ENDED, timeout=600) for task in tasks]

    def log(self, stage: str, job: str, task: int) -> str:
        """What a task printed, in all its starts."""
        path = self.work / "slurm" / f"eve-curate-{stage}-{job}_{task}.log"
        return path.read_text() if path.exists() else f"{path} is not there"

    def hanging(self, stage: str, tasks: Sequence[int]) -> dict[str, str]:
        """Variables with which the disk hangs once while tasks of a stage write."""
        files = PARTIAL.get(stage) or "|".join(f"{task:05d}" for task in tasks)
        (self.folder / "hung").mkdir(exist_ok=True)
        return {
            "PYTHONPATH": str(Path(__file__).parent / "slow_disk"),
            "HANGING": rf"/{stage}/\.partial-({files})",
            "HUNG": f"{self.folder}/hung",
        }

    def writing(self, stage: str, task: int) -> psutil.Process:
        """The process of a task that hangs in mid-write, once there is one."""
        name, deadline = f".partial-{PARTIAL.get(stage, f'{task:05d}')}", time.monotonic() + 400
        while time.monotonic() < deadline:
            if (self.folder / "hung").exists() and any(
                path.name.startswith(f"{stage}-{name}") for path in (self.folder / "hung").iterdir()
            ):
                for process in psutil.process_iter():
                    with contextlib.suppress(psutil.Error):
                        if any(f"/{stage}/{name}" in file.path for file in process.open_files()):
                            return process
            time.sleep(0.2)
        raise TimeoutError(f"task {task} of {stage} is not writing")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(Cluster(tmp_path_factory.mktemp("site") / "cluster")) as cluster:
        yield cluster


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Iterator[Site]:
    yield Site(cluster, tmp_path)
    cluster.run("scancel", "--user=root")  # what a test that failed left running


def _kill(site: Site, stage: str, tasks: Sequence[int]) -> None:
    """Kill the processes that write tables of a stage."""
    for task in tasks:
        site.writing(stage, task).kill()


def _records(folder: Path) -> list[dict[str, object]]:
    """The rows of the shards in a folder."""
    return [row for path in sorted(folder.glob("*.parquet")) for row in parquet.read_table(path).to_pylist()]


def _pair(number: int) -> Record:
    image = ImageFile(encoded(picture(64, 48, seed=number), "JPEG"))
    return Record(
        str(number), "photos", "pair", [image], [{"from": "gpt", "value": "<image>A photo of a house."}]
    )


def test_a_task_is_killed_in_mid_write_and_the_same_command_makes_it_good(site: Site) -> None:
    """Two stages of three shards; the second stage does not start before the first one is whole."""
    shards = site.folder / "shards"
    shards.mkdir()
    for number in range(3):
        write_records(shards / f"{number:05d}.parquet", map(_pair, range(4 * number, 4 * number + 4)))
    lines = [f"filter --input {shards}/*.parquet --min-side 32", "build"]
    jobs = site.submit(lines, **site.hanging("filter", [1]))
    assert [shown for _, shown in jobs.values()] == ["0-2", "0-2"]
    (filtering, _), (building, _) = jobs["filter"], jobs["build"]
    assert site.ended(filtering, [0, 2]) == ["COMPLETED"] * 2
    # While its task lives nothing is submitted again, and the next stage waits.
    found = site.call(STAGES=f"{site.folder}/stages.txt")
    assert found.returncode == 2 and "jobs of an earlier call still wait or run" in found.stderr
    assert site.cluster.state(f"{building}_0") == "PENDING"
    _kill(site, "filter", [1])
    assert site.ended(filtering, [1]) == ["FAILED"]
    assert "1 of 3 shards unfinished: 1; the same command finishes them" in site.log("filter", filtering, 1)
    assert site.ended(building, [0]) == ["CANCELLED"]
    assert not (site.work / "build").exists()
    jobs = site.submit(lines)
    assert [shown for _, shown in jobs.values()] == ["1", "0-2"]
    assert site.ended(jobs["filter"][0], [1]) == ["COMPLETED"], site.log("filter", jobs["filter"][0], 1)
    assert site.ended(jobs["build"][0], range(3)) == ["COMPLETED"] * 3, site.log("build", jobs["build"][0], 0)
    assert site.submit(lines) == {}
    assert not list(site.work.rglob(".partial-*"))
    assert [row["id"] for row in _records(site.work / "build")] == [str(number) for number in range(12)]
