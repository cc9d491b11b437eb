"""What `slurm/launch.sh` refuses, passes to srun and does with the outcome, with placeholder programs for Slurm's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = "examples/eve_7b/stage2.yaml"
TRACKER = "latest_checkpointed_iteration.txt"
LAYOUT = "examples/eve_7b/layouts/h100.yaml"
PROGRAMS = {
    # Writes down its words, and where it was called with what for users' packages; by default its run is done at once.
    "srun": 'printf "%s\\n" "$PWD" "${PYTHONNOUSERSITE:-}" "$@" > "$RECORD"\necho "$@" >> "$RECORD.calls"\n'
    '[[ -z $OUTCOME ]] || echo "$OUTCOME" > "$SAVE/outcome"\nexit "$STATUS"\n',
    "scontrol": 'echo node1\n[[ $1 != requeue ]] || touch "$RECORD.requeue"\n',
    "sbatch": 'printf "%s\\n" "$@" > "$RECORD.sbatch"\n',
    "sleep": "",
    # Stands in for the Python of a site: only the check before the start is run by it directly.
    "python": 'printf "%s\\n" "$LOCAL_WORLD_SIZE" "$@" > "$RECORD.preflight"\nprintf "%s" "$PREFLIGHT" >&2\n'
    'exit "$PREFLIGHT_STATUS"\n',
}


class Launch:
    """A batch script run by hand, with placeholders for the programs that it calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.save = folder / "run"
        self.python = str(folder / "python")
        for name, body in PROGRAMS.items():
            (folder / name).write_text(f"#!/bin/bash\n{body}")
            (folder / name).chmod(0o755)
        for name in ("captions_dataset.json", "chat_dataset.json", "config.json"):
            (folder / name).write_text("{}")

    def __call__(
        self,
        site: str | None = None,
        script: str = "pretrain_stage2",
        flags: Sequence[str] = ("--bf16",),
        **given: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run a script, with lines of the site's settings and variables."""
        settings = self.folder / "cluster.env"
        empty = "PYTHON=\nNETWORK_INTERFACE=\nCONTAINER_IMAGE=\nCONTAINER_MOUNTS=\nCONTAINER_COMMAND=()\n"
        settings.write_text(f"{empty}{f'PYTHON={self.python}' if site is None else site}\n")
        environment = {
            "PATH": f"{self.folder}:{os.environ['PATH']}", "RECORD": str(self.folder / "record"),
            "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "test", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node[1-2]", "CLUSTER_ENV": str(settings),
            "DATA": f"{self.folder}/captions", "TEACHER": str(self.folder), "LOAD": str(self.folder),
            "SAVE": str(self.save), "OUTCOME": "done", "STATUS": "0", "PREFLIGHT": "", "PREFLIGHT_STATUS": "0", **given,
        }  # fmt: skip
        return subprocess.run(
            ["bash", f"slurm/{script}.sh", *flags],
            env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def words(self) -> list[str]:
        """What srun was given the last time, behind the two words about its surroundings."""
        return (self.folder / "record").read_text().splitlines()

    def calls(self) -> list[str]:
        """What srun was given each time, in a line."""
        return [line for line in (self.folder / "record.calls").read_text().splitlines() if line[:2] == "--"]

    @property
    def ran(self) -> bool:
        """Was srun called?"""
        return (self.folder / "record").exists()

    @property
    def requeued(self) -> bool:
        """Was Slurm asked to start the job again?"""
        return (self.folder / "record.requeue").exists()

    def assert_refused(self, found: subprocess.CompletedProcess[str], sentence: str) -> None:
        """The job ended before srun, for good, and the sentence stands in its log and in SAVE/outcome."""
        assert found.returncode == 2
        assert found.stderr == f"error: {sentence}\n"
        assert (self.save / "outcome").read_text() == f"{sentence}\n"
        assert not self.ran and not self.requeued


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    return Launch(tmp_path)


def _command(words: list[str]) -> list[str]:
    """The command of a node: what stands behind the name that `bash -c` gives it."""
    return words[words.index("node") + 1 :]


def test_a_layout_stands_behind_the_recipe(launch: Launch) -> None:
    assert launch().returncode == 0
    without = launch.words()
    found = launch(LAYOUT=LAYOUT)
    assert found.returncode == 0, found.stderr
    words = launch.words()
    at = words.index("--config")
    assert words[at : at + 4] == ["--config", RECIPE, LAYOUT, "--save"]
    assert [word for word in words if word != LAYOUT] == without
    assert f"--config {RECIPE} {LAYOUT} --save" in found.stdout  # the plan says so


MANIFEST = "_dataset.json does not exist; name the prefix that tools/preprocess_data.py wrote, of a path from {root} or"
MANIFEST += " from /, without spaces"
WEIGHTS = "(the folder of stage 1, whose weights it starts from)"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"LAYOUT": "none.yaml"}, "the layout none.yaml does not exist in {root}"),
        ({"RECIPE": "none.yaml", "LAYOUT": LAYOUT}, "the recipe none.yaml does not exist in {root}"),
        ({"RECIPE": "examples/eve_7b/"}, "the recipe examples/eve_7b/ is a folder; name a file in it"),
        ({"DATA": "data/typo"}, "DATA: data/typo" + MANIFEST),
        ({"DATA": "{0}/captions {0}/typo"}, "DATA: {0}/typo" + MANIFEST),
        ({"DATA": "0.3 {0}/captions 7e-1 {0}/typo"}, "DATA: {0}/typo" + MANIFEST),
        ({"DATA": "{0}/captions\n{0}/typo\n"}, "DATA: {0}/typo" + MANIFEST),
        ({"DATA": "{0}/captions/"}, "DATA: {0}/captions/" + MANIFEST),
        (
            {"DATA": "{0}/chat_dataset.json"},
            "DATA: {0}/chat_dataset.json is a file of a dataset; name its prefix, {0}/chat",
        ),
        ({"DATA": " \n"}, "DATA: names no dataset; give the prefix that tools/preprocess_data.py wrote"),
        ({"DATA": "0.5"}, "DATA: names no dataset; give the prefix that tools/preprocess_data.py wrote"),
        ({"LOAD": "{0}/nowhere"}, "LOAD={0}/nowhere: {0}/nowhere does not exist " + WEIGHTS),
        ({"LOAD": "{0}/config.json"}, "LOAD={0}/config.json: is a file, not a folder " + WEIGHTS),
        (
            {"LOAD": "{0}/empty"},
            "LOAD={0}/empty: holds neither a config.json nor a checkpoint (latest_checkpointed_iteration.txt, iter_...)"
            f", so no weights {WEIGHTS}; name a folder in the layout of Hugging Face, or one that --save wrote",
        ),
        (
            {"LOAD": "{0}/lost"},
            "LOAD={0}/lost: its latest_checkpointed_iteration.txt names iter_0000010, which is not there; put the "
            "number of an older whole iter_ folder into it, or restore this one",
        ),
        (
            {"LOAD": "{0}/torn"},
            "{0}/torn/latest_checkpointed_iteration.txt: holds '', not an iteration; write the number of a whole iter_ "
            "folder into it",
        ),
        (
            {"TEACHER": "{0}/config.json"},
            "TEACHER={0}/config.json: is a file, not a folder (the folder of the teacher, CLIP ViT-L/14-336)",
        ),
    ],
)  # fmt: skip
def test_a_mistake_ends_the_job_before_srun(launch: Launch, given: dict[str, str], sentence: str) -> None:
    for name, tracker in (("empty", None), ("lost", "10\n"), ("torn", "\n")):
        (launch.folder / name).mkdir()
        if tracker:
            (launch.folder / name / TRACKER).write_text(tracker)
    found = launch(**{name: value.format(launch.folder) for name, value in given.items()})
    launch.assert_refused(found, sentence.format(launch.folder, root=ROOT))


def test_datasets_that_flags_name_are_looked_at_too(launch: Launch) -> None:
    captions = f"{launch.folder}/captions"
    good = ["--eval-interval", "10", "--valid-data-path", captions, f"{launch.folder}/chat", "--bf16", "true"]
    assert launch(flags=good).returncode == 0
    (launch.folder / "record").unlink()
    for flags in (
        ["--valid-data-path", captions, "typo", "--bf16"],
        ["--valid-data-path=typo"],
    ):
        found = launch(flags=flags)
        launch.assert_refused(found, f"--valid-data-path: typo{MANIFEST.format(root=ROOT)}")
    found = launch(flags=["--bf16", "--data-path", "0.5", captions, "0.5", "typo"])
    launch.assert_refused(found, f"--data-path: typo{MANIFEST.format(root=ROOT)}")


def test_data_and_weights_of_every_notation_are_taken(launch: Launch) -> None:
    (launch.folder / "stage1" / "iter_0000010").mkdir(parents=True)
    (launch.folder / "stage1" / TRACKER).write_text("10")
    captions, chat = f"{launch.folder}/captions", f"{launch.folder}/chat"
    for data in (f"0.3 {captions} .7 {chat}", f"{captions}\n  {chat}\n"):
        found = launch(DATA=data, LOAD=f"{launch.folder}/stage1/", SAVE=f"{launch.save}/")
        assert found.returncode == 0, found.stderr
        words = launch.words()
        at = words.index("--data-path")
        assert words[at + 1 : words.index("--pretrained-checkpoint")] == data.split()
    assert launch(LOAD=f"{launch.folder}/stage1/iter_0000010/").returncode == 0
    (launch.folder / "stage1" / TRACKER).unlink()
    assert launch(LOAD=f"{launch.folder}/stage1").returncode == 0


def test_a_tower_is_trained_by_a_command_of_its_own(launch: Launch) -> None:
    folder = str(launch.folder)
    found = launch(script="train_tower", SIGLIP=folder, PERCEPTUAL=f"{folder}/config.json", LOAD="")
    assert found.returncode == 0, found.stderr
    command = _command(launch.words())
    begin = command.index("megatron_eve.train_tower")
    assert command[begin + 1 :] == [
        "--config", "examples/vila_u_7b/tower.yaml", "--save", str(launch.save), "--load", str(launch.save),
        "--data-path", f"{folder}/captions", "--vision-tower", folder,
        "--perceptual-weights", f"{folder}/config.json", "--bf16",
    ]  # fmt: skip
    asked = launch(script="train_tower", SIGLIP="")
    assert "SIGLIP is not set: the folder of the SigLIP to start from" in asked.stderr


def test_the_check_before_the_start(launch: Launch) -> None:
    """It is given what the ranks are given; what it finds ends the job, and where it cannot be run the job goes on."""
    assert launch().returncode == 0
    checked = (launch.folder / "record.preflight").read_text().splitlines()
    assert checked[:5] == ["8", "-m", "megatron_eve.preflight", "--ranks", "16"]  # eight of them on each node
    command = _command(launch.words())
    assert checked[5:] == command[command.index("megatron_eve.pretrain") + 1 :]
    found = launch(PREFLIGHT="bash: module: command not found\n", PREFLIGHT_STATUS="127")
    assert found.returncode == 0
    assert "warning: what was given could not be looked at before the start (status 127)" in found.stdout
    (launch.folder / "record").unlink()
    told = "error: --seq-length 32: row 3 of captions has 50 tokens\n"
    found = launch(PREFLIGHT=f"a library warns\n{told}srun: error: node1: task 0\n", PREFLIGHT_STATUS="2")
    launch.assert_refused(found, told.removeprefix("error: ").strip())
    assert not (launch.save / "starts").exists()


def test_a_word_of_the_ranks_ends_the_job_at_its_first_start(launch: Launch) -> None:
    found = launch(OUTCOME="row 3 is longer than a pack", STATUS="1")
    assert found.returncode == 2
    assert found.stderr == "error: row 3 is longer than a pack\n"
    assert not launch.requeued


def test_starts_are_counted_anew_for_every_submission(launch: Launch) -> None:
    for job in ("1", "2"):
        for restart in range(3):
            found = launch(OUTCOME="", STATUS="1", SLURM_JOB_ID=job, SLURM_RESTART_COUNT=str(restart))
            assert f"latest: none, start {restart + 1} from there" in found.stdout
            assert launch.requeued == (restart < 2)
            (launch.folder / "record.requeue").unlink(missing_ok=True)
        assert "3 starts from checkpoint none ended without a new one" in found.stderr
    # Slurm counts its jobs from 1 again after it lost its state.
    assert "start 1 from there" in launch(OUTCOME="", STATUS="1", SLURM_JOB_ID="2").stdout


def test_the_outcome_of_another_run_that_is_alive_is_left_alone(launch: Launch) -> None:
    launch.save.mkdir()
    (launch.save / "outcome").write_text("of job 7\n")
    (launch.save / "lock").write_text('{"slurm_job_id": "7"}')
    assert launch(DATA="data/typo").returncode == 2
    assert (launch.save / "outcome").read_text() == "of job 7\n"
    launch.assert_refused(
        launch(DATA="data/typo", SLURM_JOB_ID="7"), f"DATA: data/typo{MANIFEST.format(root=ROOT)}"
    )
    os.utime(launch.save / "lock", (0, 0))  # of a run that was killed
    launch.assert_refused(launch(DATA="data/typo"), f"DATA: data/typo{MANIFEST.format(root=ROOT)}")


def test_without_a_container(launch: Launch) -> None:
    assert launch().returncode == 0
    words = launch.words()
    assert words[:2] == [str(ROOT), ""]
    assert not [word for word in words if word.startswith("--container")]
    assert _command(words)[0] == launch.python
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
    assert "--nodes=1 --ntasks=1 --container-image=/images/eve.sqsh" in launch.calls()[0]
    assert "python3 -m megatron_eve.preflight --ranks 16 --config" in launch.calls()[0]
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
    assert "eve.sif python3 -m megatron_eve.preflight --ranks 16 --config" in launch.calls()[0]
