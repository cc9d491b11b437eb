"""`slurm/preprocess_data.sh` on a real Slurm with two nodes: tasks fail, are killed, lose their node, ask for a GPU."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from pyarrow import parquet

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.indexed import IndexedVisionDataset
from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.format.manifest import read_info
from megatron_eve.data.format.merging import merge_datasets
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig, preprocess
from tests.data.helpers import encoded, picture
from tests.golden_dir import find_golden
from tests.slurm.cluster import Cluster, running, why_not
from tools.merge_datasets import main as merge_command

ROOT = Path(__file__).parents[2]
TOKENIZER = str(find_golden("tokenize") / "tokenizer.model")
SMALL = ("--image-size", "224", "--teacher-size", "112", "--workers", "1")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]


class Shards:
    """A folder of input, and what the script makes of it on the cluster."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.input, self.out = folder / "input", folder / "out"
        self.input.mkdir()
        (folder / "cluster.env").write_text(
            f"PYTHON={sys.executable}\nCONTAINER_IMAGE=\nCONTAINER_COMMAND=()\n"
        )

    def call(self, *flags: str, **given: str) -> subprocess.CompletedProcess[str]:
        """Call the script as a user does, in the root of the checkout."""
        variables = {
            "CLUSTER_ENV": f"{self.folder}/cluster.env", "SBATCH_OUTPUT": f"{self.folder}/%a.log",
            "INPUT": str(self.input), "OUT": str(self.out), "TOKENIZER": TOKENIZER, **given,
        }  # fmt: skip
        found = self.cluster.run(
            "bash", "slurm/preprocess_data.sh", *SMALL, *flags,
            env={**self.cluster.environment, **variables}, cwd=ROOT,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        return found

    def submit(self, *flags: str, **given: str) -> tuple[str, str]:
        """The same; the job's number, and the tasks that were asked for."""
        printed = self.call(*flags, **given).stdout
        found = re.search(r"sbatch --array=(\S+) [\s\S]*^Submitted batch job (\d+)$", printed, re.MULTILINE)
        assert found, printed
        return found[2], found[1]

    def ended(self, job: str, tasks: Sequence[int]) -> list[str]:
        """Wait for tasks; how they ended."""
        return [self.cluster.wait_for(f"{job}_{task}", *ENDED, timeout=400) for task in tasks]

    def log(self, task: int) -> str:
        """What a task printed, in all its starts."""
        path = self.folder / f"{task}.log"
        return path.read_text() if path.exists() else ""

    def node(self, job: str, task: int) -> str:
        """The node that a task runs on."""
        told = self.cluster.run("scontrol", "--oneliner", "show", "job", f"{job}_{task}").stdout
        return next(word.split("=")[1] for word in told.split() if word.startswith("BatchHost="))

    def prefix(self, task: int) -> str:
        """Of the dataset that a task makes."""
        return f"{self.out}/{task:05d}"

    def stop_in_mid_write(self, task: int) -> psutil.Process:
        """Suspend a task once it has written pictures and before it is done."""
        partial, deadline = Path(f"{self.prefix(task)}_image.bin.partial"), time.monotonic() + 300
        while not (partial.exists() and partial.stat().st_size):
            assert time.monotonic() < deadline, self.log(task)
            time.sleep(0.01)
        (process,) = (one for one in psutil.process_iter() if _makes(one, self.prefix(task)))
        process.suspend()
        assert partial.exists(), "the task was done before it could be stopped: give it more rows"
        return process


def _makes(process: psutil.Process, prefix: str) -> bool:
    with contextlib.suppress(psutil.Error):
        command = process.cmdline()
        return command[:1] == [sys.executable] and prefix in command
    return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(Cluster(tmp_path_factory.mktemp("site") / "cluster")) as cluster:
        yield cluster


@pytest.fixture
def shards(cluster: Cluster, tmp_path: Path) -> Iterator[Shards]:
    yield Shards(cluster, tmp_path)
    cluster.run("scancel", "--user=root")  # what a test that failed left running


def _write_shards(folder: Path, shards: int, rows: int) -> list[Path]:
    """Tar shards as img2dataset writes them; each row has an id and a caption of its own, one in ten cannot be used."""
    pictures = [encoded(picture(64, 48, seed=seed), "JPEG") for seed in range(20)]
    paths = [folder / f"{shard:05d}.tar" for shard in range(shards)]
    for shard, path in enumerate(paths):
        with tarfile.open(path, "w") as archive:
            for row in range(rows):
                key = f"{shard:05d}{row:04d}"
                about = {
                    "key": key,
                    "status": "success" if row % 10 else "failed_to_resize",
                    "url": f"u{key}",
                }
                members = {"jpg": pictures[row % 20], "txt": f"picture {key}".encode()}
                for suffix, data in (members | {"json": json.dumps(about).encode()}).items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return paths


def _assert_is_what_one_process_makes(shards: Shards, files: Sequence[Path], rows: int) -> None:
    """The datasets of the tasks, merged, against one that `preprocess` makes of all files at once."""
    parts = [str(path) for path in sorted(shards.out.glob("*_dataset.json"))]
    assert merge_command(["--output-prefix", str(shards.folder / "all"), *parts]) == 0
    whole = preprocess(
        PreprocessConfig(
            input=[str(file) for file in files], tokenizer_model=TOKENIZER,
            image_settings={"image_size": 224, "teacher_size": 112},
            output_prefix=str(shards.folder / "whole"),
        ),
        progress=False,
    )  # fmt: skip
    merged, one = open_dataset(shards.folder / "all"), open_dataset(shards.folder / "whole")
    assert len(merged) == len(one) == len(files) * rows * 9 // 10
    every = np.arange(len(one))
    assert np.array_equal(merged.samples[every], one.samples[every])
    for row in range(len(one)):  # a picture each
        for ours, theirs in zip(merged.text(row), one.text(row), strict=True):
            assert np.array_equal(ours, theirs)
        assert merged.image_bytes(row) == one.image_bytes(row)
    info = read_info(str(shards.folder / "all"))
    assert (info.num_rows, info.skipped, info.num_tokens) == (whole.num_rows, whole.skipped, whole.num_tokens)
    tables = [parquet.read_table(f"{shards.prefix(task)}_meta.parquet") for task in range(len(files))]
    metas = [row for table in tables for row in table.to_pylist()]
    assert metas == parquet.read_table(f"{shards.folder}/whole_meta.parquet").to_pylist()
    assert len({row["id"] for row in metas}) == len(metas) == len(merged)


def _assert_nothing_opens(shards: Shards, unfinished: Sequence[int], tasks: int) -> None:
    for task in unfinished:
        with pytest.raises(
            DataError, match=rf"{task:05d}_dataset\.json is missing.*did not finish: run it again"
        ):
            IndexedVisionDataset(shards.prefix(task))
    with pytest.raises(DataError, match=rf"{unfinished[0]:05d}_dataset\.json is missing"):
        merge_datasets(f"{shards.folder}/all", [shards.prefix(task) for task in range(tasks)])


def test_a_task_is_killed_in_mid_write_and_the_same_command_makes_it_good(shards: Shards) -> None:
    files = _write_shards(shards.input, 2, 1000)
    job, asked = shards.submit()
    assert asked == "0-1"
    process = shards.stop_in_mid_write(0)
    assert shards.ended(job, [1]) == ["COMPLETED"], shards.log(1)
    _assert_nothing_opens(shards, [0], 2)
    # Submitted again while it lives: two may not write one dataset.
    again, asked = shards.submit()
    assert (asked, shards.ended(again, [0])) == ("0", ["FAILED"])
    assert f"error: {shards.prefix(0)} is being written by PID " in shards.log(0)
    process.kill()
    assert shards.ended(job, [0]) == ["FAILED"]
    _assert_nothing_opens(shards, [0], 2)
    again, asked = shards.submit()
    assert (asked, shards.ended(again, [0])) == ("0", ["COMPLETED"]), shards.log(0)
    assert "== all 2 files in" in shards.call().stdout
    assert not list(shards.out.glob("*.partial"))
    _assert_is_what_one_process_makes(shards, files, 1000)


@pytest.mark.slow
def test_two_tasks_are_killed_and_a_node_is_lost(shards: Shards) -> None:
    """Eight shards; Slurm itself starts the tasks of the lost node again, the same command the killed ones."""
    files = _write_shards(shards.input, 8, 1500)
    job, asked = shards.submit()
    assert asked == "0-7"
    killed = [0, 1]  # a node each: the rest wait for them
    for process in [shards.stop_in_mid_write(task) for task in killed]:
        process.kill()
    assert shards.ended(job, killed) == ["FAILED"] * 2
    stopped = {task: shards.stop_in_mid_write(task) for task in (2, 3)}
    on_node = {shards.node(job, task): task for task in stopped}
    lost, other = on_node["node2"], on_node["node1"]
    _assert_nothing_opens(shards, range(8), 8)
    shards.cluster.cut_power(2)
    assert psutil.wait_procs([stopped[lost]], timeout=20)[1] == []
    stopped[other].resume()
    shards.cluster.wait_for(f"{job}_{lost}", "PENDING", "REQUEUED")
    shards.cluster.start_node(2)
    assert shards.ended(job, range(2, 8)) == ["COMPLETED"] * 6
    assert shards.log(lost).count("== job ") == 2
    again, asked = shards.submit()
    assert asked == "0,1"
    assert shards.ended(again, killed) == ["COMPLETED"] * 2
    assert "== all 8 files in" in shards.call().stdout
    assert not list(shards.out.glob("*.partial"))
    _assert_is_what_one_process_makes(shards, files, 1500)


@pytest.mark.slow
def test_a_task_fails_and_only_that_one_again(shards: Shards) -> None:
    photos = shards.folder / "photos"
    photos.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 48), (80 * number, 0, 0)).save(photos / f"{number}.jpg")
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"picture {number}"}]
        row = {"id": number, "image": f"{number}.jpg", "conversations": turns}
        (shards.input / f"{number:05d}.json").write_text(json.dumps([row]))
    whole = (shards.input / "00001.json").read_text()
    (shards.input / "00001.json").write_text(whole[: len(whole) // 2])  # a copy that was cut short

    job, _ = shards.submit(IMAGES=str(photos))
    assert shards.ended(job, range(3)) == ["COMPLETED", "FAILED", "COMPLETED"]
    assert f"error: {shards.input}/00001.json" in shards.log(1)
    assert sorted(path.name[:5] for path in shards.out.glob("*_dataset.json")) == ["00000", "00002"]
    made = {path: path.stat().st_mtime_ns for path in shards.out.iterdir()}
    (shards.input / "00001.json").write_text(whole)
    again, asked = shards.submit(IMAGES=str(photos))
    assert (asked, shards.ended(again, [1])) == ("1", ["COMPLETED"])
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert [len(IndexedVisionDataset(shards.prefix(number))) for number in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("gpus", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_task_has_a_gpu_for_dali(shards: Shards, gpus: int) -> None:
    """The script asks for it, and it reaches the task; what it makes is a dataset of JPEG files."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    noise = np.random.default_rng(0).integers(0, 256, (450, 600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(shards.folder / "0.jpg", quality=95)
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a picture"}]
    row = {"id": 0, "image": "0.jpg", "conversations": turns}
    (shards.input / "00000.json").write_text(json.dumps([row]))
    with (shards.folder / "cluster.env").open("a") as settings:
        settings.write(f"PREPROCESS_GPUS={gpus}\n")
    flags = ("--image-storage", "jpeg", "--image-decoder", "dali")
    job, _ = shards.submit(*flags, IMAGES=str(shards.folder))
    told = shards.cluster.run("scontrol", "--oneliner", "show", "job", f"{job}_0").stdout
    assert ("TresPerNode=gres:gpu:1" in told) == bool(gpus), told
    assert shards.ended(job, [0]) == ["COMPLETED"], shards.log(0)
    printed = shards.log(0)
    assert ("== GPUs of this task, for DALI: 1\n" in printed) == bool(gpus)
    assert ("warning: this task has no GPU, so DALI decodes on the CPU" in printed) == (not gpus)
    dataset = IndexedVisionDataset(shards.prefix(0))
    assert (dataset.info.image_storage, dataset.info.parts["image"]["image_decoder"]) == ("jpeg", "dali")
    assert len(dataset.image_bytes(0)) < (shards.folder / "0.jpg").stat().st_size
