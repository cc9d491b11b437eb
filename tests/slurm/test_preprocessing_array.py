"""Which files the tasks of `slurm/preprocess_data.sh` take, and what it asks of sbatch when it submits itself."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_eve.data.sources.fields import VIDEO_SUFFIXES
from megatron_eve.data.sources.json_reader import LINE_SUFFIXES
from megatron_eve.data.sources.recognise import LAYOUT_BY_SUFFIX
from tests.slurm.test_launch import ROOT, Launch


class Arrays(Launch):
    """Tasks of the script, run by hand."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "input").mkdir()
        (folder / "tokenizer.model").touch()

    def add(self, *names: str) -> None:
        """Make input files."""
        for name in names:
            (self.folder / "input" / name).touch()

    def made(self, *names: str) -> None:
        """Make datasets, as if tasks had done so."""
        (self.folder / "out").mkdir(exist_ok=True)
        for name in names:
            (self.folder / "out" / f"{name}_dataset.json").touch()

    def task(self, number: int, *flags: str, **given: str) -> subprocess.CompletedProcess[str]:
        """Run a task of the array."""
        return self._run(flags, SLURM_ARRAY_JOB_ID="1", SLURM_ARRAY_TASK_ID=str(number), **given)

    def submit(self, *flags: str, **given: str) -> subprocess.CompletedProcess[str]:
        """Call the script by hand."""
        (self.folder / "record.sbatch").unlink(missing_ok=True)
        return self._run(flags, SLURM_JOB_ID="", SLURM_SUBMIT_DIR="", **given)

    @property
    def submitted(self) -> list[str] | None:
        """What sbatch was given by the last call; None if it was not called."""
        record = self.folder / "record.sbatch"
        return record.read_text().splitlines() if record.exists() else None

    def _run(self, flags: Sequence[str], **given: str) -> subprocess.CompletedProcess[str]:
        folder = self.folder
        variables = {
            "INPUT": f"{folder}/input", "IMAGES": f"{folder}/input", "TOKENIZER": f"{folder}/tokenizer.model",
            "OUT": f"{folder}/out/", "OUTCOME": "", **given,
        }  # fmt: skip
        return self(script="preprocess_data", flags=flags, **variables)


@pytest.fixture
def arrays(tmp_path: Path) -> Arrays:
    return Arrays(tmp_path)


def _handed(arrays: Arrays) -> tuple[str, str]:
    """The file and the prefix that the last task gave to the tool."""
    words = arrays.words()
    return (
        Path(words[words.index("--input") + 1]).name,
        words[words.index("--output-prefix") + 1],
    )


def test_files_of_every_kind_have_a_task(arrays: Arrays) -> None:
    arrays.add("b.json", "a.jsonl", "c.ndjson", "d.JSON", "notes.txt", "00000.tar", "list.csv", "e.parquet")
    for number, name in enumerate(
        ("b.json", "d.JSON", "a.jsonl", "c.ndjson", "list.csv", "00000.tar", "e.parquet")
    ):
        found = arrays.task(number)
        assert (found.returncode, found.stderr) == (0, "")
        assert _handed(arrays) == (name, f"{arrays.folder}/out/{name.split('.')[0]}")
    assert "task 7: there are 7 files in" in arrays.task(7).stderr


def test_the_files_are_those_that_the_tool_recognises() -> None:
    script = (ROOT / "slurm" / "preprocess_data.sh").read_text()
    for suffix in {*LAYOUT_BY_SUFFIX, *LINE_SUFFIXES} - VIDEO_SUFFIXES:
        assert f'"$INPUT"/*{suffix}' in script.split("for file in")[1].split("; do")[0], suffix


def test_datasets_are_not_replaced(arrays: Arrays) -> None:
    arrays.add("a.json")
    for found in (arrays.task(0, "--overwrite"), arrays.submit("--template", "plain", "--overwrite")):
        assert found.returncode == 2
        assert found.stderr.startswith(
            "error: --overwrite: tasks are only started for files without a dataset; to"
        )
    assert not arrays.ran and arrays.submitted is None


def test_shards_need_no_folder_of_images(arrays: Arrays) -> None:
    arrays.add("00000.tar", "00001.parquet")
    for number in (0, 1):
        found = arrays.task(number, IMAGES="")
        assert (found.returncode, found.stderr) == (0, "")
        assert "--image-root" not in arrays.words()
    arrays.add("a.json")
    assert "IMAGES is not set" in arrays.task(1, IMAGES="").stderr


def test_what_img2dataset_writes_beside_its_shards_has_no_task(arrays: Arrays) -> None:
    arrays.add("00000.tar", "00000.parquet", "00000_stats.json", "00001.parquet", "00001_stats.json")
    for number, name in enumerate(("00000.tar", "00001.parquet")):
        assert arrays.task(number, IMAGES="").returncode == 0
        assert _handed(arrays)[0] == name
    assert "there are 2 files in" in arrays.task(2, IMAGES="").stderr
    arrays.add("of_people_stats.json")  # rows of LLaVA, by its name
    assert arrays.task(0).returncode == 0
    assert _handed(arrays)[0] == "of_people_stats.json"


def test_what_curation_writes_beside_its_shards_has_no_task(arrays: Arrays) -> None:
    for beside in (("stage.json",), ("prepared.json", "skipped.jsonl")):
        arrays.add("00000.parquet", "00001.parquet", *beside)
    assert "there are 2 files in" in arrays.task(2, IMAGES="").stderr
    for shard in (0, 1):
        (arrays.folder / "input" / f"0000{shard}.parquet").unlink()
    assert "there are 3 files in" in arrays.task(3).stderr  # rows by another's names


def test_it_submits_a_task_for_each_file_without_a_dataset(arrays: Arrays) -> None:
    arrays.add(*(f"part{number}.json" for number in range(10, 18)))
    script, flags = "slurm/preprocess_data.sh", ["--template", "plain"]
    found = arrays.submit(*flags)
    assert (found.returncode, found.stderr) == (0, "")
    assert arrays.submitted == ["--array=0-7", script, *flags]
    told = f"8 of 8 files in {arrays.folder}/input have no dataset in {arrays.folder}/out/ yet: "
    assert told + f"sbatch --array=0-7 {script} --template plain" in found.stdout
    arrays.made(*(f"part{number}" for number in (10, 11, 13, 15, 16)))
    assert "yet: sbatch --array=2,4,7 slurm/" in arrays.submit(*flags).stdout
    assert arrays.submitted == ["--array=2,4,7", script, *flags]
    arrays.made("part12", "part14", "part17")
    found = arrays.submit(*flags)
    assert (found.returncode, arrays.submitted) == (0, None)
    told = f"== all 8 files in {arrays.folder}/input have a dataset in {arrays.folder}/out/; to make one of them: "
    told += f"{arrays.python} tools/merge_datasets.py --output-prefix data/all {arrays.folder}/out/*_dataset.json\n"
    assert found.stdout == told
    assert not arrays.ran
    found = arrays.task(3)
    assert found.stdout.endswith("part13_dataset.json is there already: nothing to do\n")
    assert not arrays.ran


@pytest.mark.parametrize(
    ("site", "flags", "asked"),
    [
        ("", "--image-storage jpeg --image-decoder dali", ["--gpus-per-node=1"]),
        ("", "--image-decoder=dali --image-storage pixels", ["--gpus-per-node=1"]),
        ("PREPROCESS_GPUS=a100:1", "--image-decoder dali", ["--gpus-per-node=a100:1"]),
        ("PREPROCESS_GPUS=0", "--image-decoder dali", []),
        ("", "--image-storage jpeg --image-decoder threads", []),
        ("", "--image-storage jpeg", []),
    ],
)
def test_tasks_that_decode_with_dali_ask_for_a_gpu(
    arrays: Arrays, site: str, flags: str, asked: list[str]
) -> None:
    arrays.add("a.json")
    found = arrays(
        f"PYTHON={arrays.python}\n{site}", "preprocess_data", flags.split(), SLURM_JOB_ID="", OUT="out",
        INPUT=f"{arrays.folder}/input", IMAGES=f"{arrays.folder}/input", TOKENIZER=f"{arrays.folder}/tokenizer.model",
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (0, "")
    assert arrays.submitted == ["--array=0-0", *asked, "slurm/preprocess_data.sh", *flags.split()]


def test_a_task_says_whether_dali_has_a_gpu(arrays: Arrays) -> None:
    arrays.add("a.json")
    flags = ("--image-decoder", "dali")
    assert "== GPUs of this task, for DALI: 1\n" in arrays.task(0, *flags, SLURM_GPUS_ON_NODE="1").stdout
    told = "warning: this task has no GPU, so DALI decodes on the CPU (PREPROCESS_GPUS in slurm/cluster.env asks for"
    assert told in arrays.task(0, *flags, SLURM_GPUS_ON_NODE="").stdout
    assert "GPU" not in arrays.task(0).stdout


def test_outside_a_checkout_or_where_slurm_is_not_nothing_is_submitted(arrays: Arrays) -> None:
    arrays.add("a.json")
    script = str(ROOT / "slurm" / "preprocess_data.sh")
    found = subprocess.run(["bash", script], cwd=arrays.folder, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (
        2,
        f"error: {arrays.folder} is no checkout: cd to its root first\n",
    )
    programs = arrays.folder / "programs"
    programs.mkdir()
    for name in ("bash", "basename"):
        (programs / name).symlink_to(str(shutil.which(name)))
    found = arrays.submit(PATH=str(programs))
    assert (found.returncode, found.stderr) == (
        2,
        "error: sbatch is not there: call this where jobs are submitted\n",
    )


@pytest.mark.parametrize(
    ("files", "given", "sentence"),
    [
        ((), {}, "INPUT={0}/input: holds no .json, .jsonl, .ndjson, .csv, .tar or .parquet file"),
        (
            ("a.json", "my part.json"), {},
            "{0}/input/my part.json: DATA cannot name a dataset with a space in its name; rename the file, with '_' "
            "instead, say",
        ),
        (
            ("a.json", "b.jsonl", "b.ndjson"), {},
            "{0}/input holds both b.jsonl and b.ndjson, which would make one dataset; rename one of them",
        ),
        (
            ("a.json",), {"OUT": "my data"},
            "OUT=my data: DATA cannot name datasets in it, as spaces stand between its prefixes; choose another",
        ),
        (
            ("a.json",), {"TOKENIZER": "{0}/input"},
            "TOKENIZER={0}/input: is a folder; name the file in it, such as {0}/input/tokenizer.model",
        ),
        (
            ("a.json",), {"INPUT": "{0}/input/a.json"},
            "INPUT={0}/input/a.json: is a file, not a folder (the folder of .json, .jsonl, .ndjson, .csv, .tar and "
            ".parquet files to preprocess)",
        ),
        (
            ("a.mp4", "b.mp4"), {},
            "INPUT={0}/input: holds videos, which are rows of one dataset: tools/preprocess_data.py --input "
            "'{0}/input/*.mp4'",
        ),
        (("notes.txt",), {}, "INPUT={0}/input: holds no .json, .jsonl, .ndjson, .csv, .tar or .parquet file"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_preprocessed_is_refused_before_srun(
    arrays: Arrays, files: tuple[str, ...], given: dict[str, str], sentence: str
) -> None:
    arrays.add(*files)
    variables = {name: value.format(arrays.folder) for name, value in given.items()}
    for found in (arrays.task(0, **variables), arrays.submit(**variables)):
        assert (found.returncode, found.stderr) == (2, f"error: {sentence.format(arrays.folder)}\n")
    assert not arrays.ran and arrays.submitted is None
