"""LLaVA-1.5, Fuyu and a server go through stock tasks of lmms-eval: the answers of transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval")

from megatron_eve.evaluation.answering import answer_requests
from megatron_eve.evaluation.answers import Head, ShardFile, read_answers
from megatron_eve.evaluation.harnesses import Harnesses
from megatron_eve.evaluation.vision_harness import VisionHarness
from megatron_eve.inference.engine import Engine
from megatron_eve.inference.http_client import HTTPClient
from megatron_eve.inference.http_engine import HTTPEngine
from megatron_eve.inference.transformers_engine import TransformersEngine
from tests.evaluation.hub_folder import picture, write_pope, write_split
from tests.inference.baseline_models import make_fuyu, make_llava
from tests.inference.openai_server import serving
from tests.inference.test_baselines import by_fuyu, by_llava

Wanted = dict[tuple[str, int], tuple[str, dict[str, Any]]]
"""By task and row: the question, and the picture as a dataset holds it."""
TASKS = {"pope": 128, "mme": 16, "scienceqa_img": 16}
SHORT = "\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def index() -> VisionHarness:
    """Its list of tasks takes seconds; the data root is set below."""
    return VisionHarness(Path())


@pytest.fixture
def asked(tmp_path: Path, index: VisionHarness, monkeypatch: pytest.MonkeyPatch) -> tuple[Harnesses, Wanted]:
    """The tasks on toy datasets; question, picture and limit of each of their requests."""
    root = tmp_path / "root"
    monkeypatch.setattr(index, "_root", root)
    monkeypatch.setattr(Harnesses, "vision", index)
    write_pope(root, 4)
    wanted: Wanted = {}
    for at in range(4):
        wanted["pope", at] = f"Is there a thing {at} in the image?{SHORT}", picture(20 * at)
    rows = [
        {
            "question_id": f"code_reasoning/{at // 2}.png",
            "image": picture(40 + at // 2, (30 + at // 2, 90)),
            "question": f"Is it number {at}? Please answer yes or no.",
            "answer": "Yes" if at % 2 else "No",
            "category": "code_reasoning",
        }
        for at in range(4)
    ]
    write_split(root / "lmms-lab-encoder" / "MME", "test", rows)
    for at, row in enumerate(rows):
        wanted["mme", at] = row["question"].replace(" Please answer yes or no.", "") + SHORT, row["image"]
    rows = [
        {
            "image": picture(90 + at, (50, 20)),
            "question": f"Which one is {at}?",
            "choices": ["this", "that"],
            "answer": at % 2,
            "hint": "Look." if at else "",
        }
        for at in range(3)
    ]
    write_split(root / "lmms-lab-encoder" / "ScienceQA", "test", rows, "ScienceQA-IMG")
    for at, row in enumerate(rows):
        context = "Context: Look.\n" if at else ""
        options = "A. this\nB. that\nAnswer with the option's letter from the given choices directly."
        wanted["scienceqa_img", at] = f"{context}{row['question']}\n{options}", row["image"]
    harnesses = Harnesses(list(TASKS), root)
    harnesses.check_data(tmp_path / "cache")
    return harnesses, wanted


def by_generate(
    folder: Path,
    by_hand: Callable[..., dict[str, Any]],
    prompt: Callable[[str], str],
    wanted: Wanted,
) -> dict[tuple[str, int], str]:
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model, tokenizer = (
        AutoModelForImageTextToText.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    found = {}
    for (task, at), (question, image) in wanted.items():
        inputs = by_hand(folder, prompt(question), [image["bytes"]])
        ids = model.generate(**inputs, max_new_tokens=TASKS[task], do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        found[task, at] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return found


def answered(
    engine: Engine, harnesses: Harnesses, folder: Path, batch_size: int
) -> dict[tuple[str, int], str]:
    requests = harnesses.plan()
    model = {"model_path": "toy", "iteration": None, "model_sha256": "", "tokenizer_sha256": None}
    head = Head({**model, "conv_mode": engine.conv_mode, "max_new_tokens": None, "apply_exif": True}, {})
    with ShardFile(folder / "shard-0-of-1.jsonl", head) as file:
        counts = answer_requests(engine, requests, file, batch_size, lambda count: None)
    assert counts.answered == len(requests) and not counts.errors
    found = read_answers(folder, "--answers").found
    return {(request.task, request.doc_id): found[request.key].text for request in requests}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_llava_gives_the_answers_of_generate_in_three_tasks(
    asked: tuple[Harnesses, Wanted], tmp_path: Path, batch_size: int
) -> None:
    harnesses, wanted = asked
    folder = make_llava(tmp_path / "llava")
    expected = by_generate(folder, by_llava, lambda text: f"USER: <image>\n{text} ASSISTANT:", wanted)
    assert len(set(expected.values())) > len(expected) // 2
    assert answered(TransformersEngine(folder), harnesses, tmp_path, batch_size) == expected


def test_fuyu_gives_the_answers_of_generate_in_three_tasks(
    asked: tuple[Harnesses, Wanted], tmp_path: Path
) -> None:
    harnesses, wanted = asked
    folder = make_fuyu(tmp_path / "fuyu")
    expected = by_generate(folder, by_fuyu, lambda text: f"<image>{text}<0x04>", wanted)
    assert answered(TransformersEngine(folder), harnesses, tmp_path, 4) == expected


def test_a_server_gives_the_answers_of_its_model_in_three_tasks(
    asked: tuple[Harnesses, Wanted], tmp_path: Path
) -> None:
    harnesses, _ = asked
    engine = TransformersEngine(make_llava(tmp_path / "llava"))
    expected = answered(engine, harnesses, tmp_path / "here", 4)
    with serving(engine) as (url, served):
        remote = HTTPEngine(url, "tiny", client=HTTPClient(url, first_wait=0.01))
        assert answered(remote, harnesses, tmp_path / "server", 4) == expected
    assert len(served.asked) == len(expected)


def test_a_prompt_that_only_the_server_finds_too_long_is_an_error_of_its_request(
    asked: tuple[Harnesses, Wanted], tmp_path: Path
) -> None:
    engine = TransformersEngine(make_llava(tmp_path / "llava"))
    requests = [request for request in asked[0].plan() if request.task == "pope"]
    with serving(engine) as (url, served):
        body = '{"message": "This model\'s maximum context length is 9 tokens."}'
        remote = HTTPEngine(url, "tiny", client=HTTPClient(url, first_wait=0.01))
        served.failures = [(400, {}, body)]
        with ShardFile(tmp_path / "shard-0-of-1.jsonl", Head({}, {})) as file:
            counts = answer_requests(remote, requests, file, 1, lambda count: None)
    assert counts.answered == len(requests) - 1
    assert counts.errors == {"pope": {"prompt_too_long": 1}}
