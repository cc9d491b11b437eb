"""The engine of curation: tasks in processes of their own, which are killed, fail, and are made again."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_eve.curation.command import curate
from megatron_eve.curation.stage import Stage
from megatron_eve.curation.stage_record import StageRecord
from megatron_eve.curation.work import Work
from megatron_eve.data.errors import DataError
from megatron_eve.data.format.file_lock import lock_file
from tests.curation.shards import RowsStage, TogetherStage, fault_file, numbered_shards

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 3 shards of 3 rows each, in/, and a work folder in which the first stage is finished, work/."""
    folder = tmp_path_factory.mktemp("made")
    assert curate(RowsStage(), folder / "work", patterns=[numbered_shards(folder / "in", 3)], workers=3) == 0
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    """A copy of the work folder."""
    return Path(shutil.copytree(made / "work", tmp_path / "work"))


def values(folder: Path) -> list[list[int]]:
    work = Work.open(folder)
    return [work.read_table("filter", shard)["value"].to_pylist() for shard in range(len(work.inputs))]


def record(folder: Path, stage: str = "filter") -> StageRecord:
    found = StageRecord.read(Work.open(folder), stage)
    assert found is not None
    return found


def said(capfd: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """What was printed, without lines of progress, which come where the machine is slow."""
    out, err = capfd.readouterr()
    return out.splitlines(), [line for line in err.splitlines() if not re.match(r"\w+: +\d+% of ", line)]


def test_each_fault_is_named_once_and_the_same_command_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Task 0 works, 1 is killed, 2 has a bug, 3 and 4 the same mistake of the user."""
    folder, pattern = tmp_path / "work", numbered_shards(tmp_path / "in", shards=5)
    faults = {1: "kill", 2: "bug", 3: "mistake", 4: "mistake"}
    for shard, fault in faults.items():
        fault_file(folder, fault, shard).touch()
    with pytest.raises(DataError) as caught:
        curate(RowsStage(), folder, patterns=[pattern], workers=3)
    printed = folder / "filter" / "logs" / "output"
    first, *others = str(caught.value).splitlines()
    assert first == "the disk has a scratch: polish it"
    assert others[0] == "4 of 5 shards unfinished: 1-4; the same command finishes them once this is corrected"
    assert sorted(others[1:]) == [
        "  shard 1: the process was ended by SIGKILL, as the system does when memory runs out (fewer --workers "
        f"need less); what it printed is in {printed}/00001.txt",
        f"  shard 2: ZeroDivisionError: a bug; what it printed is in {printed}/00002.txt",
    ]
    assert "a line that goes to the file of this task" in (printed / "00001.txt").read_text()
    assert "Traceback" in (printed / "00002.txt").read_text()
    assert said(capfd) == (["shards  1 of 5 finished, 0 of them before"], [])
    for shard in (1, 3, 4):
        fault_file(folder, faults[shard], shard).unlink()
    assert curate(RowsStage(), folder, workers=3) == 1
    out, err = said(capfd)
    assert out == ["shards  4 of 5 finished, 1 of them before"]
    assert err[0] == "1 of 5 shards unfinished: 2; the same command finishes them"
    fault_file(folder, "bug", 2).unlink()
    assert curate(RowsStage(), folder, workers=3) == 0
    assert said(capfd) == (["shards  5 of 5 finished, 4 of them before", "rows    15"], [])
    assert values(folder) == [[0, 1, 2]] * 5
    assert not list((folder / "filter").glob(".partial*"))


def test_files_and_marks_that_do_not_fit_are_made_again(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = work / "filter"
    (folder / "00000.parquet").unlink()
    (folder / "logs" / "completions" / "00001").unlink()
    (folder / "logs" / "stats" / "00002.json").unlink()
    assert record(work).unfinished(Work.open(work)) == [0, 1, 2]
    capfd.readouterr()
    assert curate(RowsStage(), work, workers=3) == 0
    assert said(capfd)[0] == [
        "shards      3 of 3 finished, 0 of them before",
        "made again  2, marked as finished without their files: 0, 2",
        "made again  1, whose files had no mark of completion: 1",
        "rows        9",
    ]
    assert values(work) == [[0, 1, 2]] * 3


def test_the_shards_that_are_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, pattern = tmp_path / "work", numbered_shards(tmp_path / "in", shards=6, rows=1)

    def unfinished(stage: Stage) -> list[str]:
        assert curate(stage, folder, patterns=[pattern], list_unfinished=True) == 0
        return said(capfd)[0]

    assert unfinished(RowsStage()) == ["0-5"]
    assert not (folder / "filter").exists()
    assert curate(RowsStage(), folder, shards="1,3", workers=2) == 0
    assert said(capfd)[0] == ["shards  2 of 6 finished, 0 of them before"]
    assert unfinished(RowsStage()) == ["0,2,4-5"]
    # Of a stage that is to run behind it, as a job of Slurm that depends on another.
    assert unfinished(TogetherStage()) == ["0"]
    for words, says in (("7", "there are 6 shards, 0 to 5"), ("4-2", "0 to 5"), ("a", "such as 0,3,7-9")):
        with pytest.raises(DataError, match=says):
            curate(RowsStage(), folder, shards=words)
    with pytest.raises(DataError, match="begun with factor = 1, and this command has 2: give the same"):
        curate(RowsStage(factor=2), folder, list_unfinished=True)


def test_another_command_that_works_on_a_shard(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, pattern = tmp_path / "work", numbered_shards(tmp_path / "in", shards=2, rows=1)
    locks = folder / "filter" / "logs" / "locks"
    locks.mkdir(parents=True)
    lock = lock_file(locks / "00001")
    assert lock is not None
    with lock:
        assert curate(RowsStage(), folder, patterns=[pattern], workers=2) == 1
    assert said(capfd)[1] == [
        "1 of 2 shards unfinished: 1; the same command finishes them",
        "  shard 1: another command is making it",
    ]


def test_what_a_stage_was_made_from_must_stay(work: Path, made: Path, tmp_path: Path) -> None:
    """Other settings, other shards, an earlier stage that is missing, unfinished, or made again."""
    with pytest.raises(
        DataError, match=r"work/filter was begun with factor = 1, and this command has 2: give"
    ):
        curate(RowsStage(factor=2), work)
    other = numbered_shards(tmp_path / "other")
    with pytest.raises(
        DataError, match=r"shard 0 of .*inputs.json is .*/000.parquet, and --input now has .*/"
    ):
        curate(RowsStage(), work, patterns=[other])
    with pytest.raises(DataError, match=r"inputs.json lists 3 shards, and --input now names 1"):
        curate(RowsStage(), work, patterns=[str(made / "in" / "000.parquet")])
    assert curate(TogetherStage(), work) == 0
    opened = Work.open(work)
    assert opened.kept_rows(0, "duplicates").tolist() == [0, 1, 2]
    assert opened.kept_rows(0, "build").tolist() == [0, 2]
    (work / "filter" / "00002.parquet").unlink()
    with pytest.raises(
        DataError, match=r"1 of 3 shards of the stage filter in .* are unfinished \(2\): run "
    ):
        curate(TogetherStage(), work)
    shutil.rmtree(work / "filter")
    with pytest.raises(DataError, match=r"has no stage filter, which duplicates reads: run tools/curate.py"):
        curate(TogetherStage(), work)
    assert curate(RowsStage(factor=3), work, workers=3) == 0
    with pytest.raises(
        DataError, match=r"duplicates was made from another filter: delete the folder .*/dupl"
    ):
        curate(TogetherStage(), work)


def test_a_stage_that_was_made_anew_with_the_same_settings(work: Path) -> None:
    """Its rows may be others, as captions of a server are, so what was made from the old ones is refused."""
    assert curate(TogetherStage(), work) == 0
    shutil.rmtree(work / "filter")
    assert curate(RowsStage(), work, workers=3) == 0
    with pytest.raises(DataError, match=r"duplicates was made from another filter: delete the folder"):
        curate(TogetherStage(), work)


def test_other_processes_of_the_program_go_on(work: Path) -> None:
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    other.start()
    assert curate(TogetherStage(), work) == 0
    assert other.is_alive()
    other.kill()
    other.join()


def test_damaged_files_are_named_with_the_remedy(work: Path, made: Path, tmp_path: Path) -> None:
    table = work / "filter" / "00002.parquet"
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"filter/00002.parquet is missing or damaged \(.*delete it and run"):
        Work.open(work).kept_rows(2, "build")
    (work / "filter" / "stage.json").write_text("{")
    with pytest.raises(DataError, match=r"filter/stage.json is damaged .*: delete the folder .*/filter and"):
        curate(RowsStage(), work)
    shard = Path(shutil.copytree(made / "in", tmp_path / "in")) / "001.parquet"
    shard.write_bytes(b"0" + shard.read_bytes())
    inputs = (work / "inputs.json").read_text()
    (work / "inputs.json").write_text(inputs.replace(str(made), str(tmp_path)))
    with pytest.raises(
        DataError, match=r"001.parquet \(shard 1\) has .* bytes, and had .*: put the old file"
    ):
        next(Work.open(work).records(1))
    (work / "inputs.json").write_text("[]")
    with pytest.raises(DataError, match=r"inputs.json is damaged .*: choose another --work and begin anew"):
        curate(RowsStage(), work)
    with pytest.raises(DataError, match="nothing holds no curation: begin with"):
        curate(RowsStage(), tmp_path / "nothing")


SCRIPT = """
import sys
from pathlib import Path
from megatron_eve.curation.command import curate
from megatron_eve.runtime.errors import run_command
from tests.curation.shards import RowsStage
if __name__ == "__main__":
    sys.exit(run_command(lambda: curate(RowsStage(), Path(sys.argv[1]), patterns=sys.argv[2:], workers=2)))
"""


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A command that has finished one task of two, and the process of the other one, which hangs."""
    folder, pattern = tmp_path / "work", numbered_shards(tmp_path / "in", shards=2, rows=1)
    fault_file(folder, "hang", 1).touch()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = subprocess.Popen(
        [sys.executable, str(script), str(folder), pattern],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    sign, deadline = fault_file(folder, "hangs", 1), time.monotonic() + 200
    while not (sign.exists() and sign.read_text() and (folder / "filter/logs/completions/00000").exists()):
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.05)
    task = psutil.Process(int(sign.read_text()))
    yield command, task
    if task.is_running():
        task.kill()
    command.kill()
    command.communicate()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: str(number.name)
)
def test_the_tasks_end_with_their_command(
    number: signal.Signals, hanging: tuple[subprocess.Popen[str], psutil.Process]
) -> None:
    command, task = hanging
    if number == signal.SIGINT:
        os.killpg(command.pid, number)  # as a terminal does
    else:
        command.send_signal(number)
    _, err = command.communicate(timeout=60)
    _, alive = psutil.wait_procs([task], timeout=60)
    assert not alive
    if number != signal.SIGKILL:
        assert command.returncode == 130
        assert err.splitlines()[-1] == "stopped; 1 of 2 shards are finished; the same command goes on"


def tasks_of(command: subprocess.Popen[str]) -> list[psutil.Process]:
    """The tasks of a command, without the helper process of multiprocessing."""
    try:
        found = psutil.Process(command.pid).children()
        return [one for one in found if "spawn_main" in " ".join(one.cmdline())]
    except psutil.Error:
        return []


def seconds_of(task: psutil.Process) -> float:
    """CPU time that a task has used, which a busy machine does not change; 0 if it has ended."""
    try:
        return float(sum(task.cpu_times()[:2]))
    except psutil.Error:
        return 0.0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    """SIGKILL to tasks of the real filter, between their start and their last file, until there were twenty."""
    pattern = numbered_shards(tmp_path / "in", shards=8, rows=10, side=200)
    tool = [sys.executable, "tools/curate.py", "filter", "--workers", "3", "--min-side", "100", "--input"]
    tool.append(pattern)
    random, kills, statuses, folder = np.random.default_rng(0), 0, [1], tmp_path / "killed"
    while kills < 20 or statuses[-1]:
        command = subprocess.Popen(
            [*tool, "--work", str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT,
        )  # fmt: skip
        ends: dict[int, float] = {}  # CPU seconds at which a task is killed; some have finished by then
        while command.poll() is None and kills < 20:
            time.sleep(0.05)
            for task in tasks_of(command):
                if seconds_of(task) > ends.setdefault(task.pid, random.uniform(0, 4)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        task.kill()
                    ends[task.pid], kills = float("inf"), kills + 1
        _, err = command.communicate(timeout=550)
        statuses.append(command.returncode)
        unfinished = record(folder).unfinished(Work.open(folder))
        assert command.returncode == (1 if unfinished else 0), err
        assert (f"{len(unfinished)} of 8 shards unfinished: " in err) == bool(unfinished)
        if not unfinished and kills < 20:  # some are made again, so that there is something to kill
            for path in sorted(folder.glob("filter/*.parquet"))[:4]:
                path.unlink()
    assert kills >= 20 and statuses.count(1) > 1
    subprocess.run([*tool, "--work", str(tmp_path / "whole")], cwd=ROOT, env=ENVIRONMENT, check=True)
    whole, again = Work.open(tmp_path / "whole"), Work.open(folder)
    for shard in range(8):
        assert whole.read_table("filter", shard) == again.read_table("filter", shard)
    assert record(tmp_path / "whole").counts(whole) == record(folder).counts(again)
