"""`slurm/curate.sh` on a real Slurm with two nodes: stages that wait for each other, killed tasks, a lost node."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from pyarrow import parquet

from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.parquet import write_records
from tests.curation.toy import Toy, make_toy
from tests.data.helpers import encoded, picture
from tests.golden_dir import find_golden
from tests.slurm.cluster import Cluster, running, why_not
from tools.curate import main as curate
from tools.merge_datasets import main as merge
from tools.preprocess_data import main as preprocess

ROOT = Path(__file__).parents[2]
WAIT = 1800
"""Seconds that a task may take where other work is on the machine."""
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
            **given,
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
        return [self.cluster.wait_for(f"{job}_{task}", *ENDED, timeout=WAIT) for task in tasks]

    def log(self, stage: str, job: str, task: int) -> str:
        """What a task printed, in all its starts."""
        path = self.work / "slurm" / f"eve-curate-{stage}-{job}_{task}.log"
        return path.read_text() if path.exists() else f"{path} is not there"

    def hanging(self, stage: str, tasks: Sequence[int]) -> dict[str, str]:
        """Variables with which the disk hangs once while tasks of a stage write."""
        files = PARTIAL.get(stage) or "|".join(f"{task:05d}[.]" for task in tasks)
        (self.folder / "hung").mkdir(exist_ok=True)
        return {
            "PYTHONPATH": str(Path(__file__).parent / "slow_disk"),
            "HANGING": rf"/{stage}/\.partial-({files})",
            "HUNG": f"{self.folder}/hung",
        }

    def writing(self, stage: str, task: int) -> psutil.Process:
        """The process of a task that hangs in mid-write, once there is one."""
        name, deadline = f".partial-{PARTIAL.get(stage, f'{task:05d}')}", time.monotonic() + WAIT
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
    """Two stages of two shards; the second stage does not start before the first one is whole."""
    shards = site.folder / "shards"
    shards.mkdir()
    for number in range(2):
        write_records(shards / f"{number:05d}.parquet", map(_pair, range(4 * number, 4 * number + 4)))
    lines = [f"filter --input {shards}/*.parquet --min-side 32", "build"]
    jobs = site.submit(lines, **site.hanging("filter", [1]))
    assert [shown for _, shown in jobs.values()] == ["0-1", "0-1"]
    (filtering, _), (building, _) = jobs["filter"], jobs["build"]
    assert site.ended(filtering, [0]) == ["COMPLETED"]
    # While its task lives nothing is submitted again, and the next stage waits.
    found = site.call(STAGES=f"{site.folder}/stages.txt")
    assert found.returncode == 2 and "jobs of an earlier call still wait or run" in found.stderr
    assert site.cluster.state(f"{building}_0") == "PENDING"
    _kill(site, "filter", [1])
    assert site.ended(filtering, [1]) == ["FAILED"]
    assert "1 of 2 shards unfinished: 1; the same command finishes them" in site.log("filter", filtering, 1)
    assert site.ended(building, [0]) == ["CANCELLED"]
    assert not (site.work / "build").exists()
    jobs = site.submit(lines)
    assert [shown for _, shown in jobs.values()] == ["1", "0-1"]
    assert site.ended(jobs["filter"][0], [1]) == ["COMPLETED"], site.log("filter", jobs["filter"][0], 1)
    assert site.ended(jobs["build"][0], range(2)) == ["COMPLETED"] * 2, site.log("build", jobs["build"][0], 0)
    assert site.submit(lines) == {}
    assert not list(site.work.rglob(".partial-*"))
    assert [row["id"] for row in _records(site.work / "build")] == [str(number) for number in range(8)]


KILLED: dict[str, tuple[int, ...]] = {
    "filter": (1, 6), "duplicates": (0,), "features": (2, 5), "centres": (0,), "assign": (3,), "select": (0,),
    "caption": (4,), "build": (0, 7),
}  # fmt: skip
"""Tasks of each stage that are killed in mid-write. Of the features, the second one loses its node."""


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_tasks_of_every_stage_are_killed_and_a_node_is_lost(site: Site) -> None:
    """All stages in one call, eight shards; the same call again after each kill, until the dataset is there."""
    toy = make_toy(site.folder / "toy", views=2, rows_per_shard=20)
    lines, finished = toy.lines(), set[str]()
    for stage, tasks in KILLED.items():
        jobs = site.submit(lines, **site.hanging(stage, tasks))
        assert set(KILLED) - set(jobs) == finished
        (job, asked), count = jobs[stage], 1 if stage in PARTIAL else 8
        assert asked == ("0" if count == 1 else "0-7")
        lost = tasks[1:] if stage == "features" else ()
        _kill(site, stage, [task for task in tasks if task not in lost])
        _lose_nodes(site, stage, job, lost)  # four tasks are on each node
        for task, how in enumerate(site.ended(job, range(count))):
            killed = task in tasks and task not in lost
            assert how == ("FAILED" if killed else "COMPLETED"), site.log(stage, job, task)
        later = list(jobs)[list(jobs).index(stage) + 1 :]
        assert all(site.ended(jobs[name][0], [0]) == ["CANCELLED"] for name in later)
        # What was killed the time before is what was submitted of that stage.
        again = [name for name in jobs if name not in (stage, *later)]
        assert [jobs[name][1] for name in again] == [_numbers(_failed(name)) for name in again]
        finished.update(again)
    jobs = site.submit(lines)
    assert {stage: shown for stage, (_, shown) in jobs.items()} == {"build": "0,7"}
    assert site.ended(jobs["build"][0], [0, 7]) == ["COMPLETED"] * 2
    assert site.submit(lines) == {}
    assert not list(site.work.rglob(".partial-*"))
    _assert_is_what_one_process_makes(site, toy)


def _failed(stage: str) -> tuple[int, ...]:
    """Tasks of a stage that are unfinished after the kills: not that of a lost node, which Slurm starts again."""
    return KILLED[stage][:1] if stage == "features" else KILLED[stage]


def _numbers(tasks: Sequence[int]) -> str:
    return ",".join(map(str, tasks))


def _lose_nodes(site: Site, stage: str, job: str, tasks: Sequence[int]) -> None:
    """Cut the power of the node of a task in mid-write; Slurm starts what ran there once the node is back."""
    for task in tasks:
        process = site.writing(stage, task)
        told = site.cluster.run("scontrol", "--oneliner", "show", "job", f"{job}_{task}").stdout
        node = int(next(word for word in told.split() if word.startswith("BatchHost=node"))[-1])
        site.cluster.cut_power(node)
        assert psutil.wait_procs([process], timeout=20)[1] == []
        site.cluster.wait_for(f"{job}_{task}", "PENDING", "REQUEUED")
        site.cluster.start_node(node)


def _assert_is_what_one_process_makes(site: Site, toy: Toy) -> None:
    """The dataset of the array, merged, against that of stages with one process at a time, made in one go."""
    tokenizer, out = str(find_golden("tokenize") / "tokenizer.model"), site.folder / "datasets"
    small = ("--template", "plain", "--image-size", "224", "--teacher-size", "112")
    given = {
        "INPUT": f"{site.work}/build",
        "OUT": str(out),
        "TOKENIZER": tokenizer,
        "SBATCH_OUTPUT": "/dev/null",
    }
    printed = site.call("preprocess_data", *small, **given).stdout
    submitted = re.search(r"^Submitted batch job (\d+)$", printed, re.MULTILINE)
    assert submitted, printed
    shards = [path.stem for path in sorted((site.work / "build").glob("*.parquet"))]
    assert site.ended(submitted[1], range(len(shards))) == ["COMPLETED"] * len(shards)
    assert "== all" in site.call("preprocess_data", *small, **given).stdout
    assert merge(["--output-prefix", f"{site.folder}/all", *(f"{out}/{shard}" for shard in shards)]) == 0
    work = site.folder / "work of one process"
    for stage, *flags in toy.stages():
        assert curate([stage, "--work", str(work), "--workers", "1", *flags]) == 0
    words = ["--input", f"{work}/build/*.parquet", "--tokenizer-model", tokenizer, *small]
    assert preprocess([*words, "--output-prefix", f"{site.folder}/one"]) == 0

    merged, one = open_dataset(site.folder / "all"), open_dataset(site.folder / "one")
    metas = [row for shard in shards for row in parquet.read_table(f"{out}/{shard}_meta.parquet").to_pylist()]
    assert metas == parquet.read_table(f"{site.folder}/one_meta.parquet").to_pylist()
    assert len({(row["source"], row["id"]) for row in metas}) == len(metas) == len(merged) == len(one) > 20
    every = np.arange(len(one))
    assert np.array_equal(merged.samples[every], one.samples[every])
    for row in range(len(one)):
        assert merged.image_bytes(row) == one.image_bytes(row)
        for ours, theirs in zip(merged.text(row), one.text(row), strict=True):
            assert np.array_equal(ours, theirs)
