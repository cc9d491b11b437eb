"""Tasks that ask for pictures: drawn, reconstructed, classified, from plan to score, and what is missing."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_eve.data.images import decode_image
from megatron_eve.evaluation.answers import ShardFile, picture_path
from megatron_eve.evaluation.picture_answering import middle_square
from megatron_eve.evaluation.picture_tasks import PICTURE_GROUPS, PICTURE_TASKS
from megatron_eve.evaluation.requests import Request
from megatron_eve.evaluation.scorers.classes import ClassRow, score_classes
from megatron_eve.evaluation.scorers.frechet import FeatureSums, frechet_distance
from tests.evaluation.test_evaluate import answer_rows
from tests.evaluation.toy_pictures import (
    CLASSES,
    IMAGENET,
    PROMPTS,
    features_by_hand,
    picture_file,
    write_imagenet,
    write_inception,
    write_prompts,
    write_reading_tower,
)
from tests.inference.test_tools import tool
from tests.inference.vila_u_model import Model, write_model
from tests.ranks import RankPool
from tests.test_commands import ROOT

pytest.importorskip("lmms_eval")

COUNT, BROKEN = 6, 4
OF_TOWER = [name for name, task in PICTURE_TASKS.items() if task.of_tower]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root: six pictures, one of them broken, and four prompts."""
    folder = tmp_path_factory.mktemp("benchmarks")
    write_imagenet(folder, COUNT, BROKEN)
    write_prompts(folder)
    return folder


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inception(tmp_path_factory.mktemp("inception") / "inception.pt")


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reading_tower(tmp_path_factory.mktemp("towers") / "tower")


@pytest.fixture(scope="module")
def model(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return write_model(tmp_path_factory.mktemp("model"), ranks)


@pytest.fixture(scope="module")
def evaluate() -> ModuleType:
    return tool("evaluate")


@pytest.fixture
def command(evaluate: ModuleType, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command of tools/evaluate.py; returns its status, output and errors."""

    def run(
        name: str, tasks: Sequence[str], answers: str, *more: Any, data: Path = root
    ) -> tuple[int, str, str]:
        words = [
            name, "--tasks", ",".join(tasks), "--data-root", data, "--answers", tmp_path / answers,
            "--data-cache-path", tmp_path / "cache", *more,
        ]  # fmt: skip
        status = evaluate.main([str(word) for word in words])
        found = capsys.readouterr()
        return status, found.out, found.err

    return run


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "pictures").rglob("*") if path.is_file()}


def distance(made: list[np.ndarray], references: list[np.ndarray]) -> float:
    """By features that the test works out itself."""
    sums = []
    for some in (made, references):
        sums.append(FeatureSums())
        sums[-1].add(features_by_hand(some))
    return frechet_distance(*sums)


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_the_group_and_its_tasks() -> None:
    (members,) = [names for group, names in PICTURE_GROUPS.items() if group == "vila_u_table"]
    drawing = {"vila_u_fid30k", "vila_u_genai_bench"}
    assert set(members) >= set(PICTURE_TASKS) == {"vila_u_rfid", "vila_u_imagenet", *drawing}
    for task in (PICTURE_TASKS[name] for name in drawing):  # what tools/draw.py draws with
        sampling = task.sampling
        found = (task.guidance, sampling.top_k, sampling.top_p, sampling.temperature)
        assert found == (3, 900, 0.96, 1)


def test_classes_are_scored() -> None:
    rows = [
        ClassRow(0, [3, 1, 2, 0, 9], 3, "a"),
        ClassRow(1, [3, 1, 2, 0, 9], 9, "b"),
        ClassRow(2, [3, 1, 2, 0, 9, 7], 7, "c"),
        ClassRow(3, None, 3, "a"),
    ]
    first, best_five = score_classes("task", rows)
    assert first.points == (1, 0, 0, 0) and best_five.points == (1, 1, 0, 0)


def test_a_key_depends_on_how_a_picture_is_drawn_and_other_keys_do_not_change() -> None:
    def key(**changes: Any) -> str:
        fields = dict(task="t", split="s", doc_id=0, number=0, kind="draw", context="A car") | changes
        return Request(**fields).key

    assert len({key(), key(guidance=2.0), key(doc_id=1), key(kind="generate")}) == 4
    assert key(kind="generate", guidance=2.0) == key(kind="generate") == "1763bfe0793e5c2115469c64a38c4e67"


@pytest.mark.distributed
def test_a_tower_alone_is_measured(
    command: Command, root: Path, tower: Path, inception: Path, tmp_path: Path
) -> None:
    which = ("--model-path", tower, "--batch-size", 2)
    status, out, err = command("answer", OF_TOWER, "whole", *which)
    assert status == 3 and f"{2 * COUNT} of shard 0/1, {2 * COUNT} of them" in out, err
    assert "errors    vila_u_rfid: image_format 1" in out and "tokens" not in out
    rows = answer_rows(tmp_path / "whole")
    for shard in ("0/2", "1/2"):
        assert command("answer", OF_TOWER, "parts", *which, "--shard", shard, "--batch-size", 3)[0] in (0, 3)
    assert answer_rows(tmp_path / "parts") == rows and len(rows) == 2 * COUNT
    made = pictures(tmp_path / "whole")
    assert pictures(tmp_path / "parts") == made and len(made) == COUNT - 1

    results = tmp_path / "results.json"
    scored = (*OF_TOWER,), "whole", "--output", results
    status, out, err = command("score", *scored)
    assert (status, out) == (2, "") and "its score needs --inception-weights FILE" in err
    status, out, err = command("score", *scored, "--inception-weights", inception, "--mistakes", 2)
    assert status == 3, err
    found = {(one["task"], one["metric"]): one for one in json.loads(results.read_text())["results"]}
    readable = [row for row in range(COUNT) if row != BROKEN]
    by_row = {row["doc_id"]: row for row in rows if row["task"] == "vila_u_rfid"}
    reconstructed = [opened(tmp_path / "whole" / by_row[row]["text"]) for row in readable]
    originals = [decode_image(picture_file(row), apply_exif=True, max_pixels=10**6) for row in readable]
    assert {one.shape for one in reconstructed} == {(32, 32, 3)}
    squares = [middle_square(one, 32) for one in originals]
    assert np.array_equal(
        squares[0], np.asarray(originals[0].crop((4, 0, 44, 40)).resize((32, 32), Image.BICUBIC))
    )
    rfid = found["vila_u_rfid", "rFID"]
    assert rfid["value"] == pytest.approx(distance(reconstructed, squares), rel=1e-4) and rfid["value"] > 1
    assert (rfid["n"], rfid["main"], rfid["published"]["VILA-U (256)"]) == (COUNT - 1, True, 1.8)
    said = {row["doc_id"]: row.get("text", "").split() for row in rows if row["task"] == "vila_u_imagenet"}
    assert all(len(set(said[row])) == 5 for row in readable) and said[BROKEN] == []
    for metric, count in (("top-1", 1), ("top-5", 5)):
        right = sum(str(row % len(CLASSES)) in said[row][:count] for row in range(COUNT))
        assert found["vila_u_imagenet", metric]["value"] == pytest.approx(100 * right / COUNT)
    assert "vila_u_rfid: 1 requests without an answer, left out (image_format 1)" in out
    assert "vila_u_imagenet: 1 requests without an answer, scored as wrong" in out
    assert (
        "Inception network inception.pt, sha256" in out
        and "vila_u_imagenet" in results.with_name("results.mistakes.html").read_text()
    )


@pytest.mark.distributed
def test_stopped_between_a_picture_and_its_line(
    command: Command, tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, which = ["vila_u_rfid"], ("--model-path", tower, "--batch-size", 2)
    command("answer", tasks, "whole", *which)
    append, batches = ShardFile.append, []

    def stopped(file: ShardFile, answered: Any) -> None:
        batches.append(list(answered))
        if len(batches) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(file, batches[-1])

    with monkeypatch.context() as patch:
        patch.setattr(ShardFile, "append", stopped)
        assert command("answer", tasks, "stopped", *which)[0] == 2
    assert (len(pictures(tmp_path / "stopped")), len(answer_rows(tmp_path / "stopped"))) == (4, 2)
    (half,) = {picture_path(batches[1][0][0])}
    (tmp_path / "stopped" / f"{half}.123.partial").write_bytes(b"cut")
    assert "4 of them without an answer" in command("answer", tasks, "stopped", *which)[1]
    assert answer_rows(tmp_path / "stopped") == answer_rows(tmp_path / "whole")
    left = pictures(tmp_path / "stopped")
    assert {name: left[name] for name in left if name.endswith(".png")} == pictures(tmp_path / "whole")


@pytest.mark.distributed
def test_pictures_are_drawn_from_prompts(
    command: Command, model: Model, root: Path, inception: Path, tmp_path: Path
) -> None:
    tasks = ["vila_u_fid30k"]
    status, out, err = command("answer", tasks, "whole", *model.flags, "--batch-size", 4)
    assert status == 0 and "answered  4" in out, err
    for shard in ("1/2", "0/2"):
        assert command("answer", tasks, "parts", *model.flags, "--batch-size", 1, "--shard", shard)[0] == 0
    rows = answer_rows(tmp_path / "whole")
    assert rows == answer_rows(tmp_path / "parts")
    assert pictures(tmp_path / "parts") == pictures(tmp_path / "whole")
    # Prompts 0 and 1 are the same text, and their pictures are not.
    by_row = {row["doc_id"]: row for row in rows}
    drawn = [opened(tmp_path / "whole" / by_row[row]["text"]) for row in range(4)]
    assert by_row[0]["prompt"] == by_row[1]["prompt"] == "A thing 0" and not np.array_equal(
        drawn[0], drawn[1]
    )

    results = tmp_path / "results.json"
    status, out, err = command("score", tasks, "whole", "--output", results, "--inception-weights", inception)
    assert status == 0, err
    (found,) = json.loads(results.read_text())["results"]
    images = root / PROMPTS / "mjhq30k_imgs"
    references = [opened(images / ("food", "art")[row % 2] / f"id{row}.jpg") for row in range(4)]
    assert found["value"] == pytest.approx(distance(drawn, references), rel=1e-4) and found["n"] == 4
    assert "4 pictures are too few for 4 features" in out

    (tmp_path / "whole" / by_row[2]["text"]).write_bytes(b"x")
    status, _, err = command("score", tasks, "whole", "--output", results, "--inception-weights", inception)
    assert status == 2 and f"the picture {by_row[2]['key']}.png of vila_u_fid30k cannot be read" in err
    with (tmp_path / "whole" / "shard-0-of-1.jsonl").open("r+") as file:
        lines = file.readlines()
        file.seek(0)
        file.writelines(line for line in lines if by_row[2]["key"] not in line)
        file.truncate()
    status, _, err = command("score", tasks, "whole", "--output", results, "--inception-weights", inception)
    assert status == 2 and "answers are missing: vila_u_fid30k 1;" in err


@pytest.mark.distributed
def test_a_model_and_its_tower_answer_together(command: Command, model: Model, tmp_path: Path) -> None:
    """Of tasks of the tower alone the model is not opened. Another tower with the same codes gives other pictures."""
    tasks = ["vila_u_fid30k", "vila_u_rfid"]
    status, out, err = command("answer", tasks[1:], "answers", *model.flags)
    assert status == 3 and f"answered  {COUNT - 1}" in out and "weights: " not in err
    status, out, err = command("answer", tasks, "answers", *model.flags)
    assert status == 0 and "answered  4" in out and "weights: " in err
    command("answer", ["vila_u_fid30k"], "drawn", *model.flags)
    rows = answer_rows(tmp_path / "answers")
    assert [row for row in rows if row["task"] == "vila_u_fid30k"] == answer_rows(tmp_path / "drawn")

    other = tmp_path / "tower"
    shutil.copytree(model.tower, other)
    tensors = load_file(other / "model.safetensors")
    tensors["rqvaesiglip.decoder.conv_out.bias"] += 1
    save_file(tensors, other / "model.safetensors")
    status, _, err = command("answer", tasks, "answers", *model.flags, "--tower", other)
    assert status == 2 and "its pictures are of another --tower; name another folder" in err


@pytest.mark.slow
@pytest.mark.distributed
def test_without_a_network(tower: Path, root: Path, inception: Path, tmp_path: Path) -> None:
    """In a network namespace without an interface."""
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespaces here")
    more = {
        "answer": ["--model-path", tower],
        "score": ["--output", tmp_path / "results.json", "--inception-weights", inception],
    }
    for name, given in more.items():
        words = [
            "unshare", "-rn", sys.executable, ROOT / "tools" / "evaluate.py", name, "--tasks", ",".join(OF_TOWER),
            "--data-root", root, "--answers", tmp_path / "answers", "--data-cache-path", tmp_path / "cache", *given,
        ]  # fmt: skip
        found = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
        assert found.returncode == 3, found.stderr  # one picture of six is broken
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == 3


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_at_any_moment_and_drawn_by_two_ranks(
    command: Command, model: Model, root: Path, tmp_path: Path
) -> None:
    command("answer", ["vila_u_fid30k"], "whole", *model.flags)
    words = [
        ROOT / "tools" / "evaluate.py", "answer", "--tasks", "vila_u_fid30k", "--data-root", root,
        "--data-cache-path", tmp_path / "cache", *model.flags, "--batch-size", 1,
    ]  # fmt: skip

    def start(answers: str, *torchrun: str, layout: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        given = [sys.executable, *torchrun, *words, *layout, "--answers", tmp_path / answers]
        return subprocess.Popen(
            [str(word) for word in given], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    random = np.random.default_rng(0)
    for _ in range(6):
        with start("killed") as run:
            known = len(pictures(tmp_path / "killed"))
            while run.poll() is None and len(pictures(tmp_path / "killed")) == known < 4:
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.05))
            run.kill()
    assert start("killed").wait() == 0
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert start("two", *torchrun, layout=("--tensor-model-parallel-size", "2")).wait() == 0
    for answers in ("killed", "two"):
        assert answer_rows(tmp_path / answers) == answer_rows(tmp_path / "whole")
        found = {name: one for name, one in pictures(tmp_path / answers).items() if name.endswith(".png")}
        assert found == pictures(tmp_path / "whole")


def test_models_that_cannot_are_refused(
    command: Command, tower: Path, exported: Path, tmp_path: Path
) -> None:
    eve = ("--model-path", exported.parent / "run", "--tokenizer-model", exported / "tokenizer.model")
    lone = ("--model-path", tower)
    for tasks, which, says in (
        (
            ["vila_u_fid30k"],
            eve,
            "--tasks vila_u_fid30k: draws pictures; --model-path: a model of the family eve draws",
        ),
        (["vila_u_fid30k"], ("--model-path", exported), "which a checkpoint of this project does; name one"),
        (
            ["vila_u_rfid"],
            eve,
            "--tasks vila_u_rfid: needs a checkpoint of a model that reads pictures as codes",
        ),
        (
            ["pope", "vila_u_rfid"],
            lone,
            "is a tower without a language model, which pope needs; name a model, or ask",
        ),
        (["vila_u_fid30k"], lone, "which vila_u_fid30k needs; name a model"),
        (
            ["vila_u_rfid"],
            (*lone, "--tower", tower),
            "--tower: --model-path names the tower itself; leave this out",
        ),
        (
            ["vila_u_rfid"],
            (*lone, "--conv-mode", "v1"),
            "--conv-mode: --model-path names a tower, which has none",
        ),
    ):
        status, _, err = command("answer", tasks, "answers", *which)
        assert (status, err.count("\n")) == (2, 1) and says in err
        assert not (tmp_path / "answers").exists()


def test_inputs_that_are_missing_are_named(
    command: Command, tower: Path, root: Path, inception: Path, tmp_path: Path
) -> None:
    def refused(name: str, task: str, data: Path, *more: Any) -> str:
        status, _, err = command(name, [task], "answers", *more, data=data)
        assert (status, err.count("\n")) == (2, 1), err
        return err

    which = ("--model-path", tower)
    empty = tmp_path / "empty"
    empty.mkdir()
    scoring = ("--output", tmp_path / "r.json", "--inception-weights", inception)
    assert f"has no folder {IMAGENET}: copy the dataset" in refused("answer", "vila_u_rfid", empty, *which)
    assert "(meta_data.json, mjhq30k_imgs)" in refused("score", "vila_u_fid30k", empty, *scoring)

    data = tmp_path / "data"
    shutil.copytree(root, data)
    (data / PROMPTS / "mjhq30k_imgs" / "art" / "id3.jpg").unlink()
    head = {"head": {"model": {}, "data": {}, "versions": {}}}
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "shard.jsonl").write_text(json.dumps(head) + "\n")
    err = refused("score", "vila_u_fid30k", data, *scoring)
    assert "1 of 4 reference pictures are missing, the first of them" in err and "art/id3.jpg" in err
    (data / PROMPTS / "meta_data.json").write_text('{"id0": {"prompt": "A car"}}')
    assert 'id0 has no "prompt" and "category"' in refused("score", "vila_u_fid30k", data, *scoring)
    (data / PROMPTS / "meta_data.json").write_text("[")
    assert "meta_data.json cannot be read" in refused("score", "vila_u_fid30k", data, *scoring)
    shutil.rmtree(data / PROMPTS / "mjhq30k_imgs")
    assert f"{PROMPTS} has no mjhq30k_imgs; copy it there" in refused(
        "score", "vila_u_fid30k", data, *scoring
    )

    (tmp_path / "answers" / "shard.jsonl").unlink()
    (data / IMAGENET / "classes.json").write_text('["tench", ""]')
    assert "classes.json is no list of names of classes" in refused("answer", "vila_u_imagenet", data, *which)
    (data / IMAGENET / "classes.json").unlink()
    (data / IMAGENET / "README.md").write_text("# nothing")
    assert "README.md has no names of the classes" in refused("answer", "vila_u_imagenet", data, *which)
    without = tmp_path / "tower"
    shutil.copytree(tower, without)
    (without / "siglip-tiny" / "spiece.model").unlink()
    err = refused("answer", "vila_u_imagenet", root, "--model-path", without)
    assert "texts need the tokenizer of the tower's SigLIP" in err
