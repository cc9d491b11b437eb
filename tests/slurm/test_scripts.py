"""The batch scripts of `slurm/` on a real Slurm with two nodes: they finish, are cut short in every way, and go on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from megatron_eve.runtime.digests import file_digest
from tests.data.helpers import write_dataset
from tests.golden_dir import find_golden
from tests.models.vila_u.towers import write_tower
from tests.slurm.cluster import Cluster, running, why_not
from tests.test_commands import command

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
pytestmark = pytest.mark.distributed
needs_slurm = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

RECIPE = {
    "preset": "eve_mini",
    "training": {"stage": 2, "global_batch_size": 6, "train_iters": 30},
    "parallel": {"pipeline_model_parallel_size": 2},  # one stage on each node
    "vision": {"patch_aligning": True},
    "optimizer": {"lr": 4e-5},
    "data": {"seq_length": 384},
    "checkpoint": {"save_interval": 10},
}


class Site:
    """The cluster, data on its shared disk, and jobs submitted as a user does, from the root of the checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster = Cluster(folder / "cluster")
        # Of the tokenizer that the checkpoint is exported with.
        digest = file_digest(find_golden("tokenize") / "tokenizer.model")
        self.data = write_dataset(folder / "set", 40, 0, tokenizer_sha256=digest)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        (folder / "cluster.env").write_text(
            f"PYTHON={sys.executable}\nNETWORK_INTERFACE=lo\nRANKS_PER_NODE=1\nCONTAINER_IMAGE=\nCONTAINER_MOUNTS=\n"
            "CONTAINER_COMMAND=()\n"
        )

    def sbatch(self, script: str, *flags: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """Submit a script with flags behind it, options of sbatch before it, and variables; the job's number."""
        given = {"CLUSTER_ENV": str(self.folder / "cluster.env"), **variables}
        found = self.cluster.run(
            "sbatch", "--parsable", *options, f"slurm/{script}.sh", *flags,
            env={**self.cluster.environment, **{name: value for name, value in given.items() if value}}, cwd=ROOT,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        return found.stdout.strip()

    def submit(
        self,
        name: str,
        *flags: str,
        script: str = "pretrain_stage2",
        options: tuple[str, ...] = (),
        **given: str,
    ) -> str:
        """Submit a stage that saves in NAME; a variable that is given empty is left out."""
        variables = {
            "DATA": self.data,
            "TEACHER": str(find_golden("_shared/openai/clip-mini-patch14-112")),
            "LOAD": str(find_golden("_shared/hf_mini224")),
            "SAVE": str(self.folder / name),
            "RECIPE": str(self.folder / "recipe.yaml"),
            **given,
        }
        return self.sbatch(
            script, *flags, options=("--nodes=2", f"--output={self.log(name)}", *options), **variables
        )

    def log(self, name: str) -> Path:
        """What the job that saves in NAME prints."""
        return self.folder / f"{name}.log"

    def finish(self, job: str, name: str) -> str:
        """Wait for a job to complete; what it printed."""
        state = self.cluster.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", timeout=400)
        printed = self.log(name).read_text()
        assert state == "COMPLETED", printed[-4000:]
        return printed

    def losses(self, name: str) -> dict[int, tuple[str, str]]:
        """Bits of both losses of each iteration; of one that was done twice, the last ones."""
        path = self.folder / name / "losses.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        records: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return {one["iteration"]: (one["lm_loss_hex"], one["align_loss_hex"]) for one in records}

    def ranks(self, name: str) -> list[psutil.Process]:
        """Processes of the ranks of the run that saves in NAME, in their order."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.folder / name) in process.cmdline() and "RANK" in process.environ():
                    found.setdefault(int(process.environ()["RANK"]), process)
        return [found[rank] for rank in sorted(found)]

    def wait_until(self, name: str, iteration: int) -> None:
        """Wait until a run has done so many iterations."""
        deadline = time.monotonic() + 300
        while iteration not in self.losses(name):
            assert time.monotonic() < deadline, self.log(name).read_text()[-4000:]
            time.sleep(0.1)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if why_not():
        pytest.skip(str(why_not()))
    site = Site(tmp_path_factory.mktemp("site"))
    with running(site.cluster):
        yield site


@pytest.fixture(scope="module")
def whole(site: Site) -> dict[int, tuple[str, str]]:
    """Losses of a run that nothing happens to."""
    printed = site.finish(site.submit("whole"), "whole")
    assert "== done: " in printed and "is at iteration 30" in printed
    assert sorted(site.losses("whole")) == list(range(1, 31))
    return site.losses("whole")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    found = subprocess.run(
        ["shellcheck", "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    "script",
    [
        path
        for path in SCRIPTS
        if path.name not in ("launch.sh", "curate.sh", "prepare_data.sh", "preprocess_data.sh")
    ],
    ids=lambda path: path.stem,
)
def test_outside_slurm_a_script_says_what_to_do(script: Path) -> None:
    found = subprocess.run(
        ["bash", str(script)], capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"}
    )
    assert found.returncode != 0
    assert "use sbatch" in found.stderr


@needs_slurm
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"TEACHER": ""}, "error: TEACHER is not set: the folder of the teacher"),
        ({"LOAD": "nowhere"}, "error: LOAD=nowhere: nowhere does not exist (the folder of stage 1"),
        ({"SAVE": "runs/$(touch x)"}, "error: SAVE=runs/$(touch x): the name of a run is made of letters"),
        ({"RECIPE": "none.yaml"}, "error: the recipe none.yaml does not exist"),
    ],
)
def test_what_is_missing_stops_a_job_before_any_rank_starts(
    site: Site, given: dict[str, str], message: str
) -> None:
    name = f"missing-{next(iter(given))}"
    job = site.submit(name, **given)
    assert site.cluster.wait_for(job, "COMPLETED", "FAILED") == "FAILED"
    assert site.log(name).read_text().strip() == message or message in site.log(name).read_text()
    assert "srun" not in site.log(name).read_text()


@pytest.mark.slow
@needs_slurm
def test_time_runs_out(site: Site, whole: dict[int, tuple[str, str]]) -> None:
    """The signal of #SBATCH --signal, sent by hand: checkpoint, requeue, and the same losses bit for bit."""
    job = site.submit("cut")
    site.wait_until("cut", 13)
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
    printed = site.finish(job, "cut")
    assert "time is nearly up" in printed
    assert "(SIGUSR1)" in printed
    assert "requeued, to go on from checkpoint " in printed
    assert printed.count("== job ") == 2
    assert site.losses("cut") == whole


@needs_slurm
@pytest.mark.slow
def test_a_node_loses_power(site: Site, whole: dict[int, tuple[str, str]]) -> None:
    """Slurm notices and requeues; the run goes on from its last checkpoint when there are two nodes again."""
    job = site.submit("power")
    site.wait_until("power", 14)
    site.cluster.cut_power(2)
    site.cluster.wait_for(job, "PENDING", "REQUEUED")
    site.cluster.start_node(2)
    printed = site.finish(job, "power")
    assert "latest: 10" in printed
    assert site.losses("power") == whole


@needs_slurm
@pytest.mark.slow
def test_a_rank_is_killed(site: Site, whole: dict[int, tuple[str, str]]) -> None:
    """torchrun ends the other ranks, and the batch script requeues."""
    job = site.submit("rank")
    site.wait_until("rank", 13)
    site.ranks("rank")[1].kill()
    printed = site.finish(job, "rank")
    assert printed.count("== job ") == 2
    assert "requeued, to go on from checkpoint 10" in printed
    assert site.losses("rank") == whole


@needs_slurm
@pytest.mark.slow
def test_a_rank_hangs(site: Site, whole: dict[int, tuple[str, str]]) -> None:
    """A rank that stands still is waited for no longer than is allowed; the others show where they wait for it."""
    job = site.submit("hang", "--distributed-timeout-minutes", "1")
    site.wait_until("hang", 13)
    site.ranks("hang")[0].suspend()
    printed = site.finish(job, "hang")
    assert printed.count("== job ") == 2
    assert "rank 1: no step has ended for 54 s, so the run ends here" in printed
    assert "forward_backward" in printed  # of its stack
    assert site.losses("hang") == whole


@needs_slurm
def test_a_loss_that_is_not_a_number_ends_the_job_for_good(site: Site) -> None:
    """It would come again: the job is not requeued, and says what was wrong and which samples were in the step."""
    job = site.submit("nan", "--lr", "1e30", "--lr-warmup-fraction", "0")
    assert site.cluster.wait_for(job, "FAILED", "COMPLETED", timeout=300) == "FAILED"
    printed = site.log("nan").read_text()
    assert printed.count("== job ") == 1
    assert "error: iteration 2: the lm loss is nan; its update was not made" in printed
    assert "requeued" not in printed
    (bad,) = [json.loads(line) for line in (site.folder / "nan" / "bad_steps.jsonl").read_text().splitlines()]
    assert (bad["iteration"], len(bad["samples"])) == (2, RECIPE["training"]["global_batch_size"])


@needs_slurm
@pytest.mark.slow
def test_a_job_of_higher_priority_takes_the_nodes(site: Site, whole: dict[int, tuple[str, str]]) -> None:
    """Preempted: SIGTERM, a checkpoint within the grace time, and on when the nodes are free again."""
    job = site.submit("preempted", "--save-interval", "1000")
    site.wait_until("preempted", 13)
    urgent = site.cluster.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null",
        "--wrap", "sleep 5",
    )  # fmt: skip
    printed = site.finish(job, "preempted")
    assert site.cluster.state(urgent.stdout.strip()) == "COMPLETED"
    assert "(SIGTERM)" in printed
    assert "latest: none, start 2" not in printed
    assert site.losses("preempted") == whole


@needs_slurm
@pytest.mark.slow
def test_three_starts_without_a_checkpoint(site: Site) -> None:
    """A run that cannot work is not tried for ever."""
    settings = site.folder / "nowhere.env"
    settings.write_text((site.folder / "cluster.env").read_text() + "NETWORK_INTERFACE=nowhere\n")
    job = site.submit("hopeless", CLUSTER_ENV=str(settings))
    assert site.cluster.wait_for(job, "FAILED", "COMPLETED", timeout=400) == "FAILED"
    printed = site.log("hopeless").read_text()
    assert printed.count("== job ") == 3
    assert "3 starts from checkpoint none ended without a new one" in printed


@needs_slurm
@pytest.mark.slow
def test_a_mistake_ends_the_job_at_its_first_start(site: Site) -> None:
    """A vocabulary that is not the dataset's: found by reading the dataset, and not requeued into."""
    job = site.submit("mistake", "--vocab-size", "100")
    assert site.cluster.wait_for(job, "FAILED", "COMPLETED", timeout=400) == "FAILED"
    printed = site.log("mistake").read_text()
    assert "requeued" not in printed
    outcome = (site.folder / "mistake" / "outcome").read_text()
    assert "the run's vocabulary has 100" in outcome
    assert f"error: {outcome}" in printed


@needs_slurm
@pytest.mark.slow
def test_the_time_limit_itself(site: Site) -> None:
    """Slurm's own signal, some time before the limit of two minutes."""
    flags = ("--train-iters", "200", "--save-interval", "1000")
    site.finish(site.submit("long", *flags), "long")
    printed = site.finish(site.submit("limit", *flags, options=("--time=2", "--signal=B:USR1@60")), "limit")
    assert "time is nearly up" in printed
    assert site.losses("limit") == site.losses("long")


@needs_slurm
@pytest.mark.slow
def test_three_stages_in_a_row(site: Site) -> None:
    """Each stage starts from the weights of the one before, with a fresh optimizer and from its first sample."""
    before, job = str(find_golden("_shared/hf_mini224")), ""
    for stage, script in ((1, "pretrain_stage1"), (2, "pretrain_stage2"), (3, "finetune_stage3")):
        options = (f"--dependency=afterok:{job}",) if job else ()
        # What a stage starts from does not exist yet when it is submitted: it is looked for when it starts.
        job = site.submit(
            f"stage{stage}",
            "--stage",
            str(stage),
            "--train-iters",
            "5",
            script=script,
            options=options,
            LOAD=before,
        )
        before = str(site.folder / f"stage{stage}")
    export = site.sbatch(
        "convert_checkpoint", "--dtype", "bfloat16",
        options=(f"--dependency=afterok:{job}", "--cpus-per-task=1", f"--output={site.log('export')}"),
        LOAD=before, SAVE=str(site.folder / "export"), TOKENIZER=str(find_golden("tokenize")),
    )  # fmt: skip
    site.finish(export, "export")
    for stage in (1, 2, 3):
        assert sorted(site.losses(f"stage{stage}")) == [1, 2, 3, 4, 5]
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= set(os.listdir(site.folder / "export"))


@needs_slurm
@pytest.mark.slow
def test_three_stages_of_a_family_with_a_vision_tower(site: Site) -> None:
    """VILA's scripts: stage 1 from a language model and a tower (TOWER), the others from the stage before."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    folder = site.folder
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4}
    llama = LlamaConfig(hidden_size=128, intermediate_size=352, vocab_size=512, rms_norm_eps=1e-5, **sizes)
    LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    clip = CLIPVisionConfig(hidden_size=64, intermediate_size=128, image_size=112, patch_size=14, **sizes)
    CLIPVisionModel(clip).save_pretrained(folder / "clip")
    settings = {"image_size": 112, "vision_patch_size": 14, "projector_type": "mlp2x_gelu"}
    data = write_dataset(folder / "vila", 40, 0, family="vila", image_settings=settings, vocab_size=512)
    before, job = str(folder / "llama"), ""
    for stage in (1, 2, 3):
        job = site.submit(
            f"vila{stage}",
            "--train-iters", "3", "--pipeline-model-parallel-size", "2",
            script=f"vila_stage{stage}", options=(f"--dependency=afterok:{job}",) if job else (),
            LOAD=before, DATA=data, TOWER=str(folder / "clip"),
            RECIPE=str(ROOT / "examples" / "vila_tiny" / f"stage{stage}.yaml"),
        )  # fmt: skip
        before = str(folder / f"vila{stage}")
    site.finish(job, "vila3")
    for stage in (1, 2, 3):
        records = (folder / f"vila{stage}" / "losses.jsonl").read_text().splitlines()
        assert [json.loads(record)["iteration"] for record in records] == [1, 2, 3]


@needs_slurm
@pytest.mark.slow
def test_pretraining_and_fine_tuning_of_a_family_that_draws(site: Site) -> None:
    """VILA-U's scripts: from a language model without control tokens and a tower (TOWER), then from that run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = site.folder
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4}
    llama = LlamaConfig(hidden_size=128, intermediate_size=352, vocab_size=508, rms_norm_eps=1e-5, **sizes)
    LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    tower = write_tower(folder / "vision_tower")
    data = write_dataset(
        folder / "vila_u", 40, 0, family="vila_u", image_settings={"code_grid": 4}, vocab_size=512
    )
    made = command("tools/tokenize_images.py", "--tower", str(tower), "--input", str(data))
    assert made.returncode == 0, made.stderr
    recipe = {
        "preset": "vila_u_tiny",
        "vision": {"visual_codebook_size": 64},
        "training": {"global_batch_size": 4},
    }
    before, job = str(folder / "llama"), ""
    for stage, name in ((2, "pretrain"), (3, "sft")):
        recipe["training"]["stage"] = stage
        (folder / f"{name}.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        job = site.submit(
            name, "--train-iters", "3", "--pipeline-model-parallel-size", "2", script=f"vila_u_{name}",
            options=(f"--dependency=afterok:{job}",) if job else (), LOAD=before, DATA=data, TOWER=str(tower),
            RECIPE=str(folder / f"{name}.yaml"),
        )  # fmt: skip
        before = str(folder / name)
    site.finish(job, "sft")
    for name in ("pretrain", "sft"):
        records = (folder / name / "losses.jsonl").read_text().splitlines()
        assert [json.loads(record)["iteration"] for record in records] == [1, 2, 3]


@needs_slurm
@pytest.mark.slow
def test_a_run_is_asked_to_leave(site: Site, whole: dict[int, tuple[str, str]]) -> None:
    """It saves and is not done: the job neither goes on by itself nor lets start what waits for it.

    Submitted again it goes on, here under another layout and on one node.
    """
    job = site.submit("asked", "--save-interval", "1000")
    waiting = site.submit("waiting", options=(f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"))
    site.wait_until("asked", 12)
    site.cluster.run("scancel", "--signal=USR1", job)
    assert site.cluster.wait_for(job, "COMPLETED", "FAILED") == "FAILED"
    assert "error: left at iteration " in site.log("asked").read_text()
    assert site.cluster.wait_for(waiting, "CANCELLED", "RUNNING") == "CANCELLED"
    flags = ("--pipeline-model-parallel-size", "1", "--tensor-model-parallel-size", "1")
    site.finish(site.submit("asked", *flags, options=("--nodes=1",)), "asked")
    found = site.losses("asked")
    assert sorted(found) == sorted(whole)
    for iteration, losses in found.items():
        expected = [float.fromhex(loss) for loss in whole[iteration]]
        assert [float.fromhex(loss) for loss in losses] == pytest.approx(expected, abs=1e-5, rel=0)


@needs_slurm
@pytest.mark.slow
def test_scancel_ends_a_job_for_good(site: Site, whole: dict[int, tuple[str, str]]) -> None:
    job = site.submit("cancelled")
    site.wait_until("cancelled", 12)
    site.cluster.run("scancel", job)
    assert site.cluster.wait_for(job, "CANCELLED", "COMPLETED", "FAILED") == "CANCELLED"
    again = site.submit("cancelled")
    site.finish(again, "cancelled")
    assert site.losses("cancelled") == whole
