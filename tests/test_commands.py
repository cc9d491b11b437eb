"""The commands as a user starts them: preprocess, pretrain, generate; and how they fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_eve.config import load_recipe
from tests.data.helpers import write_dataset
from tests.golden_dir import find_golden

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.distributed


def command(*words: str, ranks: int = 0, timeout: int = 180) -> subprocess.CompletedProcess[str]:
    """Run a Python command, under torchrun if ranks are given."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    return subprocess.run(
        [sys.executable, *launcher, *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )


@pytest.fixture(scope="module")
def tokenizer() -> str:
    return str(find_golden("tokenize") / "tokenizer.model")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Path:
    """A dataset of eight noise pictures, made by the command."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    rows = []
    for i in range(8):
        height, width = random.integers(40, 200, 2)
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"a picture, number {i}"}]
        rows.append({"id": str(i), "image": f"{i}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    found = command(
        "tools/preprocess_data.py", "--input", str(folder / "data.json"), "--image-root", str(folder),
        "--tokenizer-model", tokenizer, "--output-prefix", str(folder / "set"), "--image-size", "224",
        "--teacher-size", "112",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return folder / "set"


SMALL = ["--preset", "eve_mini", "--global-batch-size", "4", "--seq-length", "256"]


def test_pretrain_then_generate(dataset: Path, tokenizer: str, tmp_path: Path) -> None:
    """Save under TP 2, resume under PP 2, caption under one rank; losses.jsonl and TensorBoard hold the run."""
    run = [*SMALL, "--data-path", str(dataset), "--tokenizer-model", tokenizer, "--train-iters", "4"]
    run += ["--save", str(tmp_path / "run"), "--tensorboard-dir", str(tmp_path / "board")]
    first = command(
        "-m",
        "megatron_eve.pretrain",
        *run,
        "--tensor-model-parallel-size",
        "2",
        "--exit-interval",
        "2",
        ranks=2,
    )
    assert first.returncode == 0, first.stderr
    assert "exiting at iteration 2" in first.stdout
    second = command(
        "-m", "megatron_eve.pretrain", *run, "--load", str(tmp_path / "run"), "--pipeline-model-parallel-size", "2",
        "--deterministic-mode", "--log-straggler", ranks=2,
    )  # fmt: skip
    assert second.returncode == 0, second.stderr
    assert second.stdout.count(" stragglers | forward: rank ") == 2
    assert "starting at iteration 2" in second.stdout
    records = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2, 3, 4]
    assert all(float.fromhex(record["lm_loss_hex"]) == record["lm_loss"] for record in records)
    (line,) = (line for line in second.stdout.splitlines() if "] iteration 3/4 | " in line)
    number = r"[\d.]+"
    pattern = (
        rf"\[\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration 3/4 \| consumed samples: 12 \| epoch: {number} \| "
        rf"elapsed time per iteration \(ms\): {number} \| data wait \(ms\): {number} \| "
        rf"throughput per rank \(TFLOP/s/rank\): {number} \| tokens/s: {number} \| peak RSS \(GiB\): {number} \| "
        rf"learning rate: \S+ \| lm loss: \S+ \| grad norm: {number} \| ETA: 0:0\d \|"
    )
    assert re.fullmatch(pattern, line)
    assert {"seconds", "data_wait_seconds", "peak_memory_bytes", "pack_fill", "tokens"} < set(records[2])
    for row in (
        r"run ended +all iterations are done",
        rf"iterations +2 done, 4 of 4, resumed from {tmp_path / 'run'} at iteration 2",
        rf"saved +{tmp_path / 'run'}, iteration 4",
        r"next stage +python -m megatron_eve.pretrain --stage 3 --pretrained-checkpoint .*",
    ):
        assert re.search(f"^{row}$", second.stdout, re.MULTILINE), row
    assert re.search("^run ended +--exit-interval 2$", first.stdout, re.MULTILINE), first.stdout
    # The first start's settings: what differs is printed, all of them are in a file that --config reads.
    assert "  parallel: tensor_model_parallel_size = 2 [1]\n" in first.stdout
    assert "ffn_hidden_size" not in first.stdout
    kept = load_recipe(tmp_path / "run" / "settings.yaml")
    assert kept.parallel.pipeline_model_parallel_size == 2 and kept.training.train_iters == 4
    assert list((tmp_path / "board").glob("events.*"))
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    lines = [json.dumps({"question_id": i, "image": f"{i}.jpg"}) for i in (0, 1, 99)]
    questions.write_text("\n".join(lines))
    ask = [
        "tools/generate.py", "--model-path", str(tmp_path / "run"), "--tokenizer-model", tokenizer, "--conv-mode",
        "plain", "--question-file", str(questions), "--image-folder", str(dataset.parent), "--answers-file",
        str(answers), "--max-new-tokens", "4", "--batch-size", "2",
    ]  # fmt: skip
    found = command(*ask)
    assert found.returncode == 3, found.stderr
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [0, 1, 99]
    assert ["error" in row["metadata"] for row in rows] == [False, False, True]
    assert "answered  2\nskipped   1 (image_missing 1)\nresumed   0 " in found.stdout
    # What is missing again, under another layout: one rank answers, the other follows, and the end says 3 once more.
    before = answers.read_bytes()
    answers.write_bytes(before[: before.index(b"\n") + 20])
    found = command(*ask, "--tensor-model-parallel-size", "2", ranks=2)
    assert found.returncode != 0 and "resumed   1 " in found.stdout, found.stderr
    assert answers.read_bytes() == before


@pytest.mark.gpu
def test_a_run_repeats_itself_bit_for_bit_on_a_gpu(tmp_path: Path) -> None:
    """With --deterministic-mode; without it, attention and gather add in any order."""
    found = []
    for name in ("first", "second"):
        run = [
            "--bf16",
            "--mock-data",
            "--train-iters",
            "20",
            "--deterministic-mode",
            "--save",
            str(tmp_path / name),
        ]
        done = subprocess.run(
            [sys.executable, "-m", "megatron_eve.pretrain", *SMALL, *run],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "losses.jsonl").read_text().splitlines()
        found.append([(json.loads(line)["lm_loss_hex"], json.loads(line)["grad_norm"]) for line in lines])
    assert len(found[0]) == 20
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tensor-model-parallel-size", "3"], "start a multiple of 3"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--lr", "fast"], "--lr"),
    ],
)
def test_wrong_flags_stop_before_torch(words: list[str], message: str) -> None:
    started = time.monotonic()
    found = command("-m", "megatron_eve.pretrain", "--mock-data", "--train-iters", "1", *words)
    assert found.returncode == 2
    assert message in found.stderr
    assert "Traceback" not in found.stderr
    assert time.monotonic() - started < 20


def test_wrong_flag_is_said_once_by_all_ranks() -> None:
    found = command("-m", "megatron_eve.pretrain", "--mock-data", ranks=2)
    assert found.returncode != 0
    assert found.stderr.count("--train-iters: say how long") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vocab-size", "500"], "vocabulary"),
        (["--image-size", "448"], "image size"),
        (["--seq-length", "32"], "--seq-length"),
    ],
)
def test_dataset_made_for_another_model(dataset: Path, words: list[str], message: str) -> None:
    found = command(
        "-m", "megatron_eve.pretrain", *SMALL, "--data-path", str(dataset), "--train-iters", "1", *words
    )
    assert found.returncode != 0
    assert message in found.stderr


def test_dataset_made_with_another_tokenizer(dataset: Path, tmp_path: Path, tokenizer: str) -> None:
    import sentencepiece

    text = Path(find_golden("tokenize") / "corpus.txt")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "other"),
        vocab_size=320,
        byte_fallback=True,
        minloglevel=2,
    )
    found = command(
        "-m", "megatron_eve.pretrain", *SMALL, "--data-path", str(dataset), "--train-iters", "1",
        "--tokenizer-model", str(tmp_path / "other.model"),
    )  # fmt: skip
    assert found.returncode != 0
    assert "another tokenizer" in found.stderr


def copy(dataset: Path, folder: Path, name: str) -> Path:
    """Another dataset with the same samples."""
    folder.mkdir(exist_ok=True)
    for path in dataset.parent.glob("set_*"):
        (folder / path.name.replace("set", name, 1)).write_bytes(path.read_bytes())
    return folder / name


def two_ranks_on(dataset: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Two iterations of TP 2 on a copy of the dataset that lies in `folder`; its first rank decodes."""
    return command(
        "-m", "megatron_eve.pretrain", *SMALL, "--data-path", str(folder / "set"), "--train-iters", "2",
        "--tensor-model-parallel-size", "2", ranks=2,
    )  # fmt: skip


def test_images_that_rot_are_replaced_and_counted(dataset: Path, tmp_path: Path) -> None:
    copy(dataset, tmp_path, "set")
    rotten = tmp_path / "set_image.bin"
    rotten.write_bytes(bytes(rotten.stat().st_size))
    found = two_ranks_on(dataset, tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("a grey one takes its place") == 8
    named = ", ".join(f"image {image} of {tmp_path / 'set'}" for image in range(8))
    assert f"8 damaged images were replaced by grey ones: {named};" in found.stdout


@pytest.mark.slow
def test_a_blend_with_held_out_samples(dataset: Path, tmp_path: Path) -> None:
    """Two datasets in shares, a third that is only measured; nothing appears beside them; the shares are the run's."""
    folder = tmp_path / "data"
    photos, more, other = (copy(dataset, folder, name) for name in ("photos", "more", "other"))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    run = [
        "-m", "megatron_eve.pretrain", *SMALL, "--split", "75,25", "--valid-data-path", str(other),
        "--eval-interval", "2", "--train-iters", "3", "--save", str(tmp_path / "run"),
    ]  # fmt: skip
    found = command(*run, "--data-path", "0.75", str(photos), "0.25", str(more))
    assert found.returncode == 0, found.stderr
    assert "photos: 6 samples to train on, 2 held out" in found.stdout
    assert "other: 0 samples to train on, 8 held out" in found.stdout
    for iteration in (2, 3):
        for name in ("photos", "more", "other"):
            assert f"validation loss at iteration {iteration} on {name} | lm loss value: " in found.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "valid_losses.jsonl").read_text().splitlines()]
    losses = {(line["iteration"], line["dataset"]): line["lm_loss"] for line in lines}
    assert len(losses) == 6
    assert losses[3, "photos"] == losses[3, "more"] != losses[3, "other"]  # the same split of equal samples
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before

    again = [*run, "--load", str(tmp_path / "run"), "--data-path", "0.5", str(photos), "0.5", str(more)]
    found = command(*again)
    assert found.returncode != 0
    assert "whose shares are [0.75, 0.25], this run's are [0.5, 0.5]" in found.stderr


@pytest.mark.slow
def test_batches_of_one_modality_from_a_shared_cache(tmp_path: Path) -> None:
    """16 rows with images and 4 without, in batches of 4: one step of five is of text alone, in every epoch."""
    dataset, cache, images = write_dataset(tmp_path / "set", 20, 0), tmp_path / "cache", []
    for name in ("one", "two"):
        found = command(
            "-m", "megatron_eve.pretrain", *SMALL, "--seq-length", "384", "--data-path", dataset, "--train-iters",
            "10", "--group-by-modality", "--data-cache-path", str(cache), "--save", str(tmp_path / name), ranks=2,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        lines = (tmp_path / name / "losses.jsonl").read_text().splitlines()
        images.append([json.loads(line)["images"] for line in lines])
        (path,) = cache.iterdir()
    assert path.name.startswith("modalities-")
    assert np.load(path)[0] == 16
    assert images[0] == images[1]
    assert [images[0][epoch : epoch + 5].count(0) for epoch in (0, 5)] == [1, 1]


def test_a_mock_split_that_leaves_nothing() -> None:
    found = command(
        "-m", "megatron_eve.pretrain", *SMALL, "--mock-data", "--train-iters", "1", "--split", "1,99999"
    )
    assert found.returncode != 0
    assert "leaves nothing to train on" in found.stderr


def test_a_split_that_leaves_nothing(dataset: Path) -> None:
    found = command(
        "-m",
        "megatron_eve.pretrain",
        *SMALL,
        "--data-path",
        str(dataset),
        "--train-iters",
        "1",
        "--split",
        "99,1",
    )
    assert found.returncode != 0
    assert f"--split 99,1 leaves nothing to hold out of the 8 samples of {dataset}" in found.stderr


def test_a_rank_that_fails_ends_the_others(dataset: Path, tmp_path: Path) -> None:
    """Records that do not fit their rows: the rank that decodes fails while the other waits for its pixels."""
    copy(dataset, tmp_path, "set")
    images = np.load(tmp_path / "set_images.npy")
    images["num_bytes"] += 1
    np.save(tmp_path / "set_images.npy", images)
    started = time.monotonic()
    found = two_ranks_on(dataset, tmp_path)
    assert found.returncode != 0
    assert time.monotonic() - started < 60
    assert "error: " in found.stderr and "are recorded" in found.stderr
    lost = found.stderr.find("rank 1: lost contact")
    assert lost == -1 or found.stderr.find("are recorded") < lost
