"""EVALUATE of the training scripts on a real Slurm: two checkpoints are scored, and training does not notice."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.evaluation.hub_folder import write_pope
from tests.golden_dir import find_golden
from tests.slurm.cluster import why_not
from tests.slurm.test_launch import Launch
from tests.slurm.test_scripts import Site
from tests.slurm.test_scripts import site as site  # the fixture

pytestmark = pytest.mark.distributed
FLAGS = ("--pipeline-model-parallel-size", "1", "--keep-last", "1")


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    return Launch(tmp_path)


def wait_until(done: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + 200
    while not done():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def saved(launch: Launch, *iterations: int) -> None:
    """A run's folder with checkpoints, the last of which is the latest."""
    for iteration in iterations:
        (launch.save / f"iter_{iteration:07d}").mkdir(parents=True)
        (launch.save / f"iter_{iteration:07d}" / "config.yaml").write_text(
            "logging:\n  tensorboard_dir: board\n"
        )
    (launch.save / "latest_checkpointed_iteration.txt").write_text(f"{iterations[-1]}")


def test_both_jobs_of_each_checkpoint_are_submitted_once(launch: Launch) -> None:
    saved(launch, 5, 10, 15)
    (launch.folder / "sbatch").write_text(
        '#!/bin/bash\necho "${SLURM_JOB_ID:-} $MODEL $STEP $TASKS $ANSWERS $*" >> "$RECORD.sbatch"\n'
        'wc -l < "$RECORD.sbatch"\n'
    )
    given = {
        "EVALUATE": "pope",
        "EVALUATE_EVERY": "10",
        "EVALUATE_DATA_ROOT": str(launch.folder),
        "EVALUATE_SHARDS": "4",
    }
    for _ in range(2):
        found = launch(**given, SLURM_JOB_ID="77", EVALUATE_FLAGS="--batch-size 2")
        assert found.returncode == 0, found.stderr
    place = launch.save / "evaluation" / "iter_0000010"
    answer, score = (launch.folder / "record.sbatch").read_text().splitlines()
    assert answer == (
        f" {launch.save} 10 pope {place}/answers --parsable --array=0-3 --output={place}/answer-%A_%a.log "
        "slurm/evaluate.sh --batch-size 2"
    )
    assert "--dependency=afterok:1 " in score and score.endswith("--tensorboard-dir board/evaluation")
    assert (place / "jobs").read_text() == "1 2\n"
    assert (launch.save / "iter_0000010" / "lease-slurm-1.json").exists()


def test_an_sbatch_that_fails_is_a_warning(launch: Launch) -> None:
    saved(launch, 10)
    (launch.folder / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: no such account' >&2\nexit 1\n")
    found = launch(EVALUATE="pope", EVALUATE_EVERY="10", EVALUATE_DATA_ROOT=str(launch.folder))
    assert found.returncode == 0, found.stderr
    assert "sbatch: error: no such account" in found.stderr
    assert "could not be submitted whole; training goes on" in found.stdout and "== done: " in found.stdout
    assert not list((launch.save / "iter_0000010").glob("lease-*"))


def test_what_evaluations_lack_ends_the_job_before_it_starts(launch: Launch) -> None:
    found = launch(EVALUATE="pope")
    launch.assert_refused(
        found,
        "EVALUATE_DATA_ROOT is not set: the folder of the benchmarks, --data-root of tools/evaluate.py. Give it before "
        "sbatch, as in EVALUATE_DATA_ROOT=... sbatch slurm/...",
    )


@pytest.mark.parametrize(
    ("of_rank_0", "status", "requeued", "said"),
    [
        ("", 1, True, "status 1; requeued"),  # it was killed before it could say anything
        ("130", 1, True, "status 130; requeued"),
        ("2", 2, False, "== job 7_3, start 1 of it: shard 1/4 of pope"),
        ("3", 0, False, "more than 1 % of a task's requests have no answer"),
    ],
)
def test_the_status_is_that_of_rank_0_where_torchrun_gives_another(
    launch: Launch, of_rank_0: str, status: int, requeued: bool, said: str
) -> None:
    (launch.folder / "srun").write_text(
        '#!/bin/bash\necho "$*" > "$RECORD"\n'
        '[[ -z $OF_RANK_0 ]] || echo "$OF_RANK_0" > "$MEGATRON_EVE_STATUS_FILE"\nexit 1\n'
    )
    answers = launch.folder / "answers"
    answers.mkdir()
    (answers / "shard-1-of-4.status").write_text("2\n")  # of an earlier start: it does not count
    found = launch(
        script="evaluate", flags=("--tensor-model-parallel-size", "2"), OF_RANK_0=of_rank_0,
        MODEL=str(launch.folder), TASKS="pope", DATA_ROOT=str(launch.folder), ANSWERS=str(answers),
        SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_TASK_MIN="2", SLURM_ARRAY_TASK_COUNT="4",
    )  # fmt: skip
    assert (found.returncode, launch.requeued) == (status, requeued), found.stderr
    assert said in found.stdout
    assert "--nproc-per-node 2 tools/evaluate.py answer" in (launch.folder / "record").read_text()


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_two_evaluations_while_a_model_trains_and_a_node_is_lost(site: Site) -> None:
    pytest.importorskip("lmms_eval")
    folder, cluster = site.folder, site.cluster
    write_pope(folder / "benchmarks", 12)
    one_node = ("--nodes=1", "--nodelist=node1")
    flags = (*FLAGS, "--train-iters", "20")
    site.finish(site.submit("alone", *flags, options=one_node), "alone")
    given = {
        "EVALUATE": "pope", "EVALUATE_EVERY": "10", "EVALUATE_DATA_ROOT": str(folder / "benchmarks"),
        "EVALUATE_POLL_SECONDS": "1", "EVALUATE_OPTIONS": "--nodelist=node2", "DATA_CACHE": str(folder / "cache"),
        "EVALUATE_FLAGS": f"--batch-size 1 --tokenizer-model {find_golden('tokenize') / 'tokenizer.model'}",
    }  # fmt: skip
    job = site.submit("evaluated", *flags, options=one_node, **given)
    first, second = (folder / "evaluated" / f"iter_00000{iteration}" for iteration in (10, 20))
    places = [folder / "evaluated" / "evaluation" / checkpoint.name for checkpoint in (first, second)]

    def answered() -> bool:
        file = places[0] / "answers" / "shard-0-of-1.jsonl"
        return file.exists() and len(file.read_text().splitlines()) >= 3

    def told() -> str:
        logs = [site.log("evaluated"), *(folder / "evaluated" / "evaluation").glob("*/*.log")]
        return "\n".join(path.read_text()[-2000:] for path in logs if path.exists())

    wait_until(answered, told)
    cluster.cut_power(2)
    site.finish(job, "evaluated")
    assert site.losses("evaluated") == site.losses("alone")
    assert first.is_dir() and second.is_dir()  # --keep-last 1 has left the one that is read
    assert not (folder / "alone" / first.name).exists()
    array, score = (places[0] / "jobs").read_text().split()
    assert cluster.state(array) != "COMPLETED" and (first / f"lease-slurm-{array}.json").exists()

    cluster.start_node(2)
    log = folder / "evaluated" / "evaluation.jsonl"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) == 2, told)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(row["iteration"] for row in rows) == [10, 20]
    assert all(0 <= row["scores"]["pope"]["pope_accuracy"] <= 1 for row in rows)
    assert cluster.wait_for(score, "COMPLETED", "FAILED") == "COMPLETED"
    assert "start 2 of it" in (places[0] / f"answer-{array}_0.log").read_text()

    # The dead process's lease expires; the evaluations have ended, and so the next save removes both.
    for lease in (*first.glob("lease-*"), *second.glob("lease-*")):
        if not lease.name.startswith("lease-slurm-"):
            os.utime(lease, (0, lease.stat().st_mtime - 301))
    again = {**given, "EVALUATE_EVERY": "1000"}
    site.finish(
        site.submit("evaluated", *FLAGS, "--train-iters", "30", options=one_node, **again), "evaluated"
    )
    assert [path.name for path in (folder / "evaluated").glob("iter_*")] == ["iter_0000030"]
