"""GenAI-Bench: pictures that a model draws of its prompts, and a judge that is asked about each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.answers import Answered
from megatron_eve.evaluation.data_root import check_dataset
from megatron_eve.evaluation.picture_data import read_judged_prompts
from megatron_eve.evaluation.picture_harness import PictureHarness
from tests.evaluation.judge_server import NAME, JudgeServed
from tests.evaluation.test_pictures import Command, command, evaluate, model
from tests.inference.openai_server import serving
from tests.inference.vila_u_model import Model

pytest.importorskip("lmms_eval")

__all__ = ["command", "evaluate", "model"]
TASK, FOLDER = "vila_u_genai_bench", "BaiqiL/GenAI-Bench-1600"
PROMPTS = {"00000": "a red cup", "00001": "two cats", "00012": "no dog"}
SKILLS = {"attribute": [0], "basic": [0, 1], "advanced": ["00012"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("benchmarks"))


def write(root: Path, prompts: object = None, skills: object = SKILLS) -> Path:
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: {"id": name, "prompt": text} for name, text in PROMPTS.items()}
    (folder / "genai_image.json").write_text(json.dumps(rows if prompts is None else prompts))
    (folder / "genai_skills.json").write_text(json.dumps(skills))
    return root


def test_the_prompts_and_their_skills(root: Path, tmp_path: Path) -> None:
    found = read_judged_prompts(root / FOLDER, "x")
    assert [(row.id, row.prompt) for row in found] == list(PROMPTS.items())
    assert [row.skills for row in found] == [("attribute", "basic"), ("basic",), ("advanced",)]
    (write(tmp_path) / FOLDER / "genai_skills.json").unlink()
    assert {row.skills for row in read_judged_prompts(tmp_path / FOLDER, "x")} == {()}


WRONG: Mapping[str, Callable[[Path], object]] = {
    "genai_image.json is no object of prompts by id; copy it again": lambda root: write(root, []),
    'genai_image.json: 7 has no "prompt"; copy it again': lambda root: write(root, {"7": {"prompt": " "}}),
    "genai_skills.json: basic has no list of ids": lambda root: write(root, None, {"basic": 3}),
    "has no genai_image.json; copy it there": lambda root: (root / FOLDER).mkdir(parents=True),
    f"has no folder {FOLDER}: copy the dataset there, as the hub has it (genai_image.json)": lambda root: (
        None
    ),
}


@pytest.mark.parametrize("said", WRONG)
def test_files_that_cannot_be_read(said: str, tmp_path: Path) -> None:
    WRONG[said](tmp_path)
    harness = PictureHarness(tmp_path)
    with pytest.raises(DataError) as caught:
        (need,) = harness.needs(TASK)
        check_dataset(tmp_path, need)
        harness.plan(TASK, tmp_path)
    assert said in str(caught.value) and str(caught.value).startswith(
        f"--tasks {TASK}: --data-root {tmp_path}"
    )


def test_a_prompt_that_is_too_long_is_wrong(root: Path, tmp_path: Path) -> None:
    harness = PictureHarness(root, tmp_path)
    requests = harness.plan(TASK, tmp_path)
    found = {one.key: Answered(f"pictures/{one.doc_id}.png") for one in requests}
    found[requests[1].key] = Answered(error="prompt_too_long: x")
    (measured,), _ = harness.score(TASK, tmp_path, found)
    assert (measured.value, measured.judge_rule, measured.main) == (None, "picture", True)
    assert [row.answer for row in measured.judged] == ["pictures/0.png", None, "pictures/2.png"]
    assert (
        measured.judged[2].picture == tmp_path / "pictures" / "2.png" and measured.judged[1].picture is None
    )


@pytest.mark.distributed
def test_drawn_and_judged(command: Command, model: Model, root: Path, tmp_path: Path) -> None:
    """The cup with 0.9, the cats with 0.5, the dog with 0.1: basic 70, advanced 10."""
    status, _, err = command("answer", [TASK], "answers", *model.flags, "--batch-size", 3)
    assert status == 0, err
    scored = ("score", [TASK], "answers", "--output", tmp_path / "results.json")
    status, out, err = command(*scored)
    assert status == 0 and "- vila_u_genai_bench: a judge alone scores these pictures: --judge-url" in out, (
        err
    )
    shares = {"a red cup": 0.9, "two cats": 0.5, "no dog": 0.1}
    judge = JudgeServed(
        lambda text, _: next({"Yes": p, "No": 1 - p} for name, p in shares.items() if f'"{name}"' in text)
    )
    with serving(judge) as (url, _):
        status, out, err = command(*scored, "--judge-url", url)
    assert status == 0, err
    found = {
        one["metric"]: one["value"] for one in json.loads((tmp_path / "results.json").read_text())["results"]
    }
    by = f"judged by {NAME}"
    assert found == {
        "pictures": None,
        f"probability of yes, {by}": pytest.approx(50),
        f"probability of yes: basic, {by}": pytest.approx(70),
        f"probability of yes: advanced, {by}": pytest.approx(10),
    }
    sent = {body["messages"][0]["content"][0]["image_url"]["url"] for _, body in judge.asked}
    assert len(sent) == len(judge.asked) == 3
