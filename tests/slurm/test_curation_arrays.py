"""What `slurm/curate.sh` and `slurm/prepare_data.sh` ask of sbatch, and what their tasks run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.slurm.test_launch import ROOT, Launch

PYTHON = """#!/bin/bash
# Answers --list-unfinished with what the test wrote for the stage.
echo "$@" >> "$RECORD.python"
cat "$(dirname "$0")/unfinished.$2" 2>&1
[[ ! -e $(dirname "$0")/mistake.$2 ]] || { cat "$(dirname "$0")/mistake.$2" >&2; exit 2; }
"""
PROGRAMS = {
    # Numbers of jobs are 11, 12 ...
    "sbatch": 'echo "$SHARDS_PER_TASK $LAST_SHARD $*" >> "$RECORD.sbatch"\n'
    'echo "$((10 + $(wc -l < "$RECORD.sbatch")));cluster"\n',
    "squeue": 'echo "$@" >> "$RECORD.squeue"; cat "$(dirname "$0")/queue" 2> /dev/null\n',
    "scontrol": 'echo "MaxArraySize            = $MAX_ARRAY_SIZE"\n',
}


class Curation(Launch):
    """The script, called by hand or as a task."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name, body in PROGRAMS.items():
            (folder / name).write_text(f"#!/bin/bash\n{body}")
            (folder / name).chmod(0o755)
        (folder / "python").write_text(PYTHON)
        self.work = folder / "my work"
        self.unfinished(filter="0-39", duplicates="0", features="0-39", caption="0-39", build="0-39")

    def unfinished(self, **stages: str) -> None:
        """What the tool lists for stages."""
        for stage, numbers in stages.items():
            (self.folder / f"unfinished.{stage}").write_text(numbers + "\n")

    def submit(self, *flags: str, lines: str = "", **given: str) -> subprocess.CompletedProcess[str]:
        """Call the script by hand, with lines of a file of stages if there are any."""
        (self.folder / "record.sbatch").unlink(missing_ok=True)
        if lines:
            (self.folder / "stages.txt").write_text(lines)
            given["STAGES"] = f"{self.folder}/stages.txt"
        variables = {
            "WORK": str(self.work),
            "SLURM_JOB_ID": "",
            "SLURM_SUBMIT_DIR": "",
            "MAX_ARRAY_SIZE": "1001",
        }
        return self(script="curate", flags=flags, **{**variables, **given})

    @property
    def submitted(self) -> list[str]:
        """Of each call of sbatch: shards of a task, the last shard, the words without those that are always there."""
        record = self.folder / "record.sbatch"
        found = []
        for line in record.read_text().splitlines() if record.exists() else []:
            for word in ("--parsable ", f"--output={self.work}/slurm/%x-%A_%a.log ", "slurm/curate.sh "):
                assert line.count(word) == 1, line
                line = line.replace(word, "")
            found.append(line.replace("--job-name=eve-curate-", ""))
        return found

    def task(self, number: int, *words: str, **given: str) -> subprocess.CompletedProcess[str]:
        """Run a task of an array."""
        variables = {
            "WORK": str(self.work), "OUTCOME": "", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(number),
            "SLURM_CPUS_PER_TASK": "16", "SHARDS_PER_TASK": "16", "LAST_SHARD": "39",
        }  # fmt: skip
        return self(script="curate", flags=words, **{**variables, **given})

    def assert_ran(self, *words: str) -> None:
        """What the last task ran."""
        ran = self.words()
        assert ran[ran.index("node") + 1 :] == [self.python, "tools/curate.py", *words]


@pytest.fixture
def curation(tmp_path: Path) -> Curation:
    return Curation(tmp_path)


def test_a_stage_is_an_array_over_its_unfinished_shards(curation: Curation) -> None:
    found = curation.submit("filter", "--input", "a shard/*.parquet")
    assert (found.returncode, found.stderr) == (0, "")
    assert curation.submitted == ["16 39 filter --array=0-2 filter --input a shard/*.parquet"]
    assert "== filter: job 11, shards 0-39 in 3 tasks of up to 16\n" in found.stdout
    asked = (curation.folder / "record.python").read_text()
    assert (
        asked
        == f"tools/curate.py filter --work {curation.work} --input a shard/*.parquet --list-unfinished\n"
    )
    curation.unfinished(filter="3,17-18,39")
    curation.submit("filter", SHARDS_PER_TASK="2")
    assert curation.submitted == ["2 39 filter --array=1,8,9,19 filter"]
    curation.unfinished(filter="none")
    found = curation.submit("filter")
    assert (found.returncode, found.stdout, curation.submitted) == (0, "== filter: finished\n", [])


def test_stages_of_a_file_wait_for_each_other(curation: Curation) -> None:
    lines = "# all\n\nfilter --input 'a shard/*.parquet' \"b\"\n  duplicates\n"
    lines += "features --tower towers/clip\ncaption --model m\nbuild"
    found = curation.submit(lines=lines, CURATE_OPTIONS="--mem=8G --qos=low")
    assert (found.returncode, found.stderr) == (0, "")
    assert curation.submitted == [
        "16 39 filter --array=0-2 --mem=8G --qos=low filter --input a shard/*.parquet b",
        "16 0 duplicates --array=0-0 --dependency=afterok:11 --kill-on-invalid-dep=yes --mem=8G --qos=low duplicates",
        "1 39 features --array=0-39 --dependency=afterok:12 --kill-on-invalid-dep=yes --gpus-per-node=1 --mem=8G "
        "--qos=low features --tower towers/clip",
        "1 39 caption --array=0-39 --dependency=afterok:13 --kill-on-invalid-dep=yes --gpus-per-node=1 --mem=8G "
        "--qos=low caption --model m",
        "16 39 build --array=0-2 --dependency=afterok:14 --kill-on-invalid-dep=yes --mem=8G --qos=low build",
    ]  # fmt: skip
    # Some time later: the filter is done, two shards have no features.
    curation.unfinished(filter="none", duplicates="none", features="7,9")
    curation.submit(lines=lines)
    assert [line.split(" --kill")[0] for line in curation.submitted] == [
        "1 9 features --array=7,9 --gpus-per-node=1 features --tower towers/clip",
        "1 39 caption --array=0-39 --dependency=afterok:11",
        "16 39 build --array=0-2 --dependency=afterok:12",
    ]


def test_an_array_is_not_larger_than_the_site_allows(curation: Curation) -> None:
    curation.unfinished(filter="0-99", caption="0-99")
    curation.submit("filter", MAX_ARRAY_SIZE="3")
    assert curation.submitted == ["34 99 filter --array=0-2 filter"]
    curation.submit("caption", MAX_ARRAY_SIZE="50")
    assert curation.submitted == ["2 99 caption --array=0-49 --gpus-per-node=1 caption"]
    curation.submit("caption", MAX_ARRAY_SIZE="50", SHARDS_PER_TASK="9")
    assert curation.submitted == ["9 99 caption --array=0-11 --gpus-per-node=1 caption"]


@pytest.mark.parametrize(
    ("site", "flags", "asked"),
    [
        ("", "features", "--gpus-per-node=1"),
        ("CURATE_GPUS=a100:1", "features", "--gpus-per-node=a100:1"),
        ("CURATE_GPUS=0", "features", ""),
        ("", "caption --base-url http://head:8000/v1", ""),
        ("", "filter", ""),
    ],
)
def test_stages_that_run_a_model_ask_for_a_gpu(curation: Curation, site: str, flags: str, asked: str) -> None:
    found = curation(
        f"PYTHON={curation.python}\n{site}", "curate", flags.split(), WORK=str(curation.work), SLURM_JOB_ID="",
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (0, "")
    (line,) = curation.submitted
    assert line.startswith("1 39" if asked else "16 39")
    assert [word for word in line.split() if word.startswith("--gpus")] == asked.split()


def test_a_task_runs_its_shards(curation: Curation) -> None:
    work = str(curation.work)
    found = curation.task(0, "filter", "--min-side", "449")
    assert (found.returncode, found.stderr) == (0, "")
    curation.assert_ran("filter", "--work", work, "--shards", "0-15", "--workers", "16", "--min-side", "449")
    curation.task(2, "filter")  # the last one
    curation.assert_ran("filter", "--work", work, "--shards", "32-39", "--workers", "16")
    curation.task(7, "features", "--tower", "t", SHARDS_PER_TASK="4")
    curation.assert_ran("features", "--work", work, "--shards", "28-31", "--workers", "1", "--tower", "t")
    curation.task(0, "duplicates", LAST_SHARD="0")
    curation.assert_ran("duplicates", "--work", work, "--shards", "0-0", "--workers", "16")
    assert curation.task(0, "filter", STATUS="1").returncode == 1


@pytest.mark.parametrize(
    ("flags", "given", "sentence"),
    [
        (
            (), {},
            "no stage: name one, as in WORK=... bash slurm/curate.sh filter --input ..., or a file of stages, "
            "STAGES=stages.txt",
        ),
        (
            ("filter",), {"WORK": ""},
            "WORK is not set: the work folder of the curation. Give it before sbatch, as in WORK=... sbatch slurm/...",
        ),
        (
            ("filter", "--work", "w"), {},
            "filter --work w: --work, --shards and --workers are given by this script; set WORK and SHARDS_PER_TASK "
            "instead",
        ),
        (("filter",), {"SHARDS_PER_TASK": "0"}, "SHARDS_PER_TASK=0: is no number of shards"),
        (
            (), {"STAGES": "none.txt"},
            "STAGES=none.txt: none.txt does not exist (a file with a stage and its flags in each line)",
        ),
        (
            (), {"lines": "# nothing\n"},
            "STAGES={0}/stages.txt: has no line (a file with a stage and its flags in each line)",
        ),
        ((), {"lines": "filter --input 'a\n"}, "a quotation mark is missing: filter --input 'a"),
        (
            ("filter",), {"lines": "filter\n"},
            "filter: STAGES={0}/stages.txt names the stages; leave one of both out",
        ),
        ((), {"lines": "filter\nassign\n"}, "{0}/my work has no stage centres: run it first"),
        (("filter",), {"queue": "12\n12\n11\n"}, "WORK={0}/my work: jobs of an earlier call still wait or run (11,12); "
        "call this again when they have ended, or scancel them"),
    ],
)  # fmt: skip
def test_what_cannot_be_submitted_whole_is_refused(
    curation: Curation, flags: tuple[str, ...], given: dict[str, str], sentence: str
) -> None:
    (curation.folder / "mistake.assign").write_text(
        f"error: {curation.work} has no stage centres: run it first\n"
    )
    if queue := given.pop("queue", ""):
        (curation.folder / "queue").write_text(queue)
        (curation.work / "slurm").mkdir(parents=True)
        (curation.work / "slurm" / "jobs").write_text("11\n12\n")
    found = curation.submit(*flags, lines=given.pop("lines", ""), **given)
    assert (found.returncode, found.stderr) == (2, f"error: {sentence.format(curation.folder)}\n")
    assert curation.submitted == []


def test_jobs_of_an_earlier_call_that_have_ended_do_not_matter(curation: Curation) -> None:
    assert curation.submit(lines="filter\nduplicates\n").returncode == 0
    assert (curation.work / "slurm" / "jobs").read_text() == "11\n12\n"
    assert curation.submit("filter").returncode == 0
    assert (curation.folder / "record.squeue").read_text() == "--noheader --format=%F --jobs=11,12\n"
    assert (curation.work / "slurm" / "jobs").read_text() == "11\n"


class TestPreparing:
    """`slurm/prepare_data.sh`."""

    LINES = "# downloads\nlaion --source a --output {0}/laion\n"
    LINES += "sa1b --source 'b c' --output={0}/sa1b --rows-per-shard 9\n"

    def call(self, curation: Curation, lines: str = LINES, **given: str) -> subprocess.CompletedProcess[str]:
        file = curation.folder / "downloads.txt"
        file.write_text(lines.format(curation.folder))
        (curation.folder / "record.sbatch").unlink(missing_ok=True)
        variables = {"DOWNLOADS": str(file), "SLURM_JOB_ID": "", "OUTCOME": "", **given}
        return curation(script="prepare_data", flags=(), **variables)

    def submitted(self, curation: Curation) -> str:
        record = curation.folder / "record.sbatch"
        return record.read_text().strip() if record.exists() else ""

    def test_lines_without_an_output_have_a_task(self, curation: Curation) -> None:
        found = self.call(curation)
        assert (found.returncode, found.stderr) == (0, "")
        assert self.submitted(curation) == "--array=0-1 slurm/prepare_data.sh"
        (curation.folder / "laion").mkdir()
        (curation.folder / "laion" / "prepared.json").touch()
        assert "== 1 of 2 lines of" in self.call(curation).stdout
        assert self.submitted(curation) == "--array=1 slurm/prepare_data.sh"
        (curation.folder / "sa1b").mkdir()
        (curation.folder / "sa1b" / "prepared.json").touch()
        assert "== all 2 lines of" in self.call(curation).stdout
        assert self.submitted(curation) == ""

    def test_a_task_runs_its_line(self, curation: Curation) -> None:
        task = {"SLURM_JOB_ID": "1", "SLURM_ARRAY_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "16"}
        assert self.call(curation, SLURM_ARRAY_TASK_ID="1", **task).returncode == 0
        ran = curation.words()
        assert ran[ran.index("node") + 1 :] == [
            curation.python, "tools/prepare_data.py", "sa1b", "--source", "b c", f"--output={curation.folder}/sa1b",
            "--rows-per-shard", "9", "--workers", "16",
        ]  # fmt: skip
        assert "task 2: there are 2 lines" in self.call(curation, SLURM_ARRAY_TASK_ID="2", **task).stderr

    @pytest.mark.parametrize(
        ("lines", "sentence"),
        [
            ("laion --source a\n", "DOWNLOADS={0}/downloads.txt: has no --output: laion --source a"),
            (
                "laion --source a --output p\nsa1b --source b --output p\n",
                "DOWNLOADS={0}/downloads.txt: two lines have --output p; give each its own folder",
            ),
            ("laion --source 'a\n", "a quotation mark is missing: laion --source 'a"),
        ],
    )
    def test_lines_that_cannot_be_prepared(self, curation: Curation, lines: str, sentence: str) -> None:
        found = self.call(curation, lines)
        assert (found.returncode, found.stderr) == (2, f"error: {sentence.format(curation.folder)}\n")
        assert self.submitted(curation) == ""


def test_scripts_are_run_in_a_checkout(curation: Curation) -> None:
    for script in ("curate", "prepare_data"):
        found = subprocess.run(
            ["bash", str(ROOT / "slurm" / f"{script}.sh")],
            cwd=curation.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (found.returncode, found.stderr) == (
            2,
            f"error: {curation.folder} is no checkout: cd to its root first\n",
        )
