"""Which files the tasks of `slurm/preprocess_data.sh` take, and what an array that does not cover them says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.slurm.test_launch import Launch


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

    def task(
        self, number: int, first: int, last: int, count: int | None = None, **given: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a task of `--array=FIRST-LAST`, or of a list of COUNT tasks between the two."""
        folder = self.folder
        variables = {
            "INPUT": f"{folder}/input", "IMAGES": f"{folder}/input", "TOKENIZER": f"{folder}/tokenizer.model",
            "OUT": f"{folder}/out/", "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": str(number),
            "SLURM_ARRAY_TASK_MIN": str(first), "SLURM_ARRAY_TASK_MAX": str(last),
            "SLURM_ARRAY_TASK_COUNT": str(last - first + 1 if count is None else count), "OUTCOME": "", **given,
        }  # fmt: skip
        return self(script="preprocess_data", **variables)


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
    arrays.add("b.json", "a.jsonl", "c.ndjson", "d.JSON", "notes.txt", "00000.tar", "list.csv")
    for number, name in enumerate(("b.json", "d.JSON", "a.jsonl", "c.ndjson", "list.csv", "00000.tar")):
        found = arrays.task(number, 0, 5)
        assert (found.returncode, found.stderr) == (0, "")
        assert _handed(arrays) == (name, f"{arrays.folder}/out/{name.split('.')[0]}")
    assert "there are 6 files in" in arrays.task(6, 0, 6).stderr


def test_shards_need_no_folder_of_images(arrays: Arrays) -> None:
    arrays.add("00000.tar", "00001.tar")
    found = arrays.task(1, 0, 1, IMAGES="")
    assert (found.returncode, found.stderr) == (0, "")
    assert "--image-root" not in arrays.words()
    arrays.add("a.json")
    assert "IMAGES is not set" in arrays.task(1, 0, 2, IMAGES="").stderr


def test_an_array_that_leaves_files_out_says_so_and_fails(arrays: Arrays) -> None:
    arrays.add(*(f"part{number}.json" for number in range(10, 30)))
    told = (
        f"4 of 20 files in {arrays.folder}/input have neither a task in this array nor a dataset yet (part26.json to "
        "part29.json): when this array has ended, submit it with --array=0-19; what is there is not made again"
    )
    found = arrays.task(3, 0, 15)
    assert (found.returncode, found.stderr) == (0, "")
    assert f"warning: {told}\n" in found.stdout
    found = arrays.task(15, 0, 15)
    assert (found.returncode, found.stderr) == (2, f"error: the file of this task is done, but {told}\n")
    assert _handed(arrays)[0] == "part25.json"
    found = arrays.task(19, 1, 19)  # counted from 1
    assert found.returncode == 2
    assert "1 of 20 files" in found.stderr and "(part10.json to part10.json)" in found.stderr
    # Tasks that were chosen are done when they are done, and so is a short array after the others.
    for first, last, count in ((3, 3, 1), (3, 7, 2)):
        found = arrays.task(last, first, last, count)
        assert (found.returncode, found.stderr) == (0, "")
        assert "warning: " in found.stdout
    arrays.made(*(f"part{number}" for number in range(10, 26)))
    found = arrays.task(19, 16, 19)
    assert (found.returncode, found.stderr) == (0, "")
    assert "warning" not in found.stdout
    # Nothing is left to do for the task, and yet files are left out.
    assert arrays.task(15, 0, 15).returncode == 2


@pytest.mark.parametrize(
    ("files", "given", "sentence"),
    [
        ((), {}, "INPUT={0}/input: holds no .json, .jsonl, .ndjson, .csv or .tar file"),
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
            "INPUT={0}/input/a.json: is a file, not a folder (the folder of .json, .jsonl and .ndjson files to "
            "preprocess)",
        ),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_preprocessed_is_refused_before_srun(
    arrays: Arrays, files: tuple[str, ...], given: dict[str, str], sentence: str
) -> None:
    arrays.add(*files)
    found = arrays.task(0, 0, 15, **{name: value.format(arrays.folder) for name, value in given.items()})
    assert (found.returncode, found.stderr) == (2, f"error: {sentence.format(arrays.folder)}\n")
    assert not arrays.ran
