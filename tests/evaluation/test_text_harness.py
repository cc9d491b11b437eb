"""lm-eval between the requests and the answers: MMLU, BBH and DROP on toy folders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.data.errors import DataError
from megatron_eve.data.text.turns import Turn
from megatron_eve.evaluation.answers import Answered, MissingAnswers
from megatron_eve.evaluation.harnesses import Harnesses
from megatron_eve.evaluation.mistakes import write_mistakes
from megatron_eve.evaluation.requests import Request
from tests.evaluation.hub_folder import write_split

pytest.importorskip("lm_eval")

from megatron_eve.evaluation.text_harness import TextHarness


def configs(root: Path, task: str) -> list[str]:
    return [need.config or "" for need in TextHarness(root).needs(task)]


def mmlu_row(subject: str, number: int) -> dict[str, Any]:
    return {
        "question": f"What of {subject} is {number}?",
        "subject": subject,
        "choices": [f"{letter} of {number}" for letter in "pqrs"],
        "answer": number % 4,
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two test rows and five shots of each of 57 subjects, two rows of each of 27 tasks, and DROP with four shots."""
    root = tmp_path_factory.mktemp("benchmarks")
    for subject in configs(root, "mmlu"):
        for split, count in (("test", 2), ("validation", 1), ("dev", 5)):
            write_split(
                root / "cais" / "mmlu", split, [mmlu_row(subject, row) for row in range(count)], subject
            )
    for name in configs(root, "bbh_cot_fewshot"):
        rows = [{"input": f"Is {name} {row}?", "target": "(A)" if row else "False"} for row in range(2)]
        write_split(root / "SaylorTwift" / "bbh", "test", rows, name)
    for split, count in (("train", 4), ("validation", 2)):
        rows = [drop_row(row, split) for row in range(count)]
        write_split(root / "EleutherAI" / "drop", split, rows)
    return root


def drop_row(number: int, split: str) -> dict[str, Any]:
    blank = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": []}
    return {
        "section_id": "s",
        "passage": f"{number} {split} dogs ran.",
        "question": "How many dogs ran?",
        "query_id": f"{split}{number}",
        "answer": {**blank, "number": str(number), "worker_id": "", "hit_id": ""},
        "validated_answers": {
            "number": [str(number)], "date": [blank["date"]], "spans": [["dogs"]], "worker_id": [""], "hit_id": [""],
        },
    }  # fmt: skip


def opened(root: Path, *names: str) -> Harnesses:
    harnesses = Harnesses(names, root)
    harnesses.check_data(root.parent / "cache")
    return harnesses


def main_value(harnesses: Harnesses, found: Mapping[str, Answered]) -> float | None:
    (value,) = [one.value for one in harnesses.score(found)[0] if one.main]
    return value


def right(plan: Sequence[Request], wrong_rows: frozenset[int]) -> dict[str, Answered]:
    """Likelihoods that choose the label of a row, or in some rows the choice behind it."""
    found = {}
    for one in plan:
        choice = (one.doc_id + (one.doc_id in wrong_rows)) % 4
        found[one.key] = Answered(log_likelihood=-1.0 if one.number == choice else -2.0)
    return found


@pytest.fixture(scope="module")
def mmlu(root: Path) -> tuple[Harnesses, list[Request]]:
    """Its 57 datasets take seconds to open."""
    harnesses = opened(root, "mmlu")
    return harnesses, harnesses.plan()


def test_mmlu(mmlu: tuple[Harnesses, list[Request]]) -> None:
    harnesses, plan = mmlu
    assert len(plan) == 57 * 2 * 4 == len({one.key for one in plan})
    one = next(one for one in plan if one.split == "mmlu_anatomy")
    assert one.kind == "log_likelihood" and one.conversation is None and one.shots == 5
    said = "The following are multiple choice questions (with answers) about anatomy.\n\nWhat of"
    assert one.context.startswith(said)
    assert one.context.count("\nAnswer:") == 6 and one.context.endswith("\nD. s of 0\nAnswer:")
    assert [other.continuation for other in plan if (other.split, other.doc_id) == (one.split, one.doc_id)] == [
        " A", " B", " C", " D",
    ]  # fmt: skip
    found = right(plan, frozenset({1}))
    found[one.key] = Answered(error="prompt_too_long: 5,000 tokens")  # the right choice of its row: now wrong
    assert main_value(harnesses, found) == pytest.approx(56 / 114)


@pytest.mark.slow
def test_wrong_choices_are_on_the_page(mmlu: tuple[Harnesses, list[Request]], tmp_path: Path) -> None:
    harnesses, plan = mmlu
    measured, requests = harnesses.score(right(plan, frozenset({1})), graded=True)
    (main,) = [one for one in measured if one.main]
    assert [points for points, _ in main.graded] == [1, 0] * 57
    page = tmp_path / "page.html"
    assert write_mistakes(page, 2, measured, requests, right(plan, frozenset({1}))) == []
    content = page.read_text(encoding="utf-8")
    assert "mmlu: 57 of 114 answers are wrong" in content and content.count("<article") == 2
    assert content.count("<b>answer</b> C</pre>") == 2 and content.count("<b>label</b>1</pre>") == 2


@pytest.mark.slow
def test_in_the_chat_template_each_shot_is_a_turn(root: Path, mmlu: tuple[Harnesses, list[Request]]) -> None:
    plan = opened(root, "mmlu_chat").plan()
    one = next(one for one in plan if one.split == "mmlu_anatomy")
    assert one.conversation is not None
    turns = one.conversation().turns
    assert [turn.role for turn in turns] == ["system", *["human", "gpt"] * 5, "human"]
    assert turns[2] == Turn("gpt", "A") and turns[-1].text.endswith("D. s of 0\nAnswer:")
    assert one.continuation == "A"  # the template ends where an answer begins
    assert not {one.key for one in plan} & {one.key for one in mmlu[1]}


def test_bbh(root: Path) -> None:
    harnesses = opened(root, "bbh_cot_fewshot")
    plan = harnesses.plan()
    assert len(plan) == 27 * 2 and {one.kind for one in plan} == {"generate"}
    assert "\n\n" in plan[0].stop and plan[0].context.endswith("A: Let's think step by step.\n")
    said = {
        one.key: Answered("So the answer is (A)." if one.doc_id else "The answer is False.") for one in plan
    }
    assert main_value(harnesses, said) == 0.5  # "the answer is" counts its case
    (main,) = [one for one in harnesses.score(said, graded=True)[0] if one.main]
    assert [points for points, _ in main.graded] == [0, 1] * 27 and main.graded[0][1] == {"label": "False"}
    said = {
        one.key: Answered("So the answer is (A)." if one.doc_id else "So the answer is False.")
        for one in plan
    }
    assert main_value(harnesses, said) == 1.0


def test_drop(root: Path) -> None:
    harnesses = opened(root, "drop")
    plan = harnesses.plan()
    assert [(one.stop, one.shots) for one in plan] == [((".",), 3)] * 2
    assert plan[0].context.count("How many dogs ran?") == 4 and "train dogs" in plan[0].context
    said = {one.key: Answered(f" {one.doc_id}" if one.doc_id else "seven") for one in plan}
    assert main_value(harnesses, said) == pytest.approx(0.5)
    del said[plan[1].key]
    with pytest.raises(MissingAnswers, match=r"^drop 1$"):
        harnesses.score(said)


def test_labels_that_are_missing_are_one_sentence(root: Path, tmp_path: Path) -> None:
    write_split(tmp_path / "EleutherAI" / "drop", "train", [drop_row(row, "train") for row in range(4)])
    row = {name: value for name, value in drop_row(0, "validation").items() if name != "answer"}
    write_split(tmp_path / "EleutherAI" / "drop", "validation", [row])
    with pytest.raises(
        DataError, match=r"--tasks drop: lm-eval could not read the data in --data-root .*; compare"
    ):
        opened(tmp_path, "drop").plan()
    with pytest.raises(DataError, match=r"--tasks mmlu: .* has no folder cais/mmlu: copy the dataset there"):
        opened(tmp_path, "mmlu")


def test_choices_are_those_of_lm_evals_own_model(
    mmlu: tuple[Harnesses, list[Request]], exported: Path, tmp_path: Path
) -> None:
    """A model of text of the golden sizes with random weights, through lm-eval's hf model and through ours."""
    pytest.importorskip("transformers")
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoProcessor

    from megatron_eve.evaluation.answering import answer_requests
    from megatron_eve.evaluation.answers import Head, ShardFile, read_answers
    from megatron_eve.inference.hf_engine import HFEngine
    from megatron_eve.inference.origin import AnswerOrigin

    plan = [one for one in mmlu[1] if one.split in ("mmlu_anatomy", "mmlu_virology")]
    engine = HFEngine(exported, "vicuna_v1")
    head = Head(AnswerOrigin("m", None, "s", None, "vicuna_v1", None, True).to_metadata(), {})
    with ShardFile(tmp_path / "a.jsonl", head) as file:
        answer_requests(engine, plan, file, 8, lambda _: None)
    ours = read_answers(tmp_path, "--answers").found

    tokenizer = AutoProcessor.from_pretrained(exported).tokenizer
    model = HFLM(pretrained=engine._model, tokenizer=tokenizer, backend="causal", batch_size=4)
    from lm_eval.api.instance import Instance

    asked = [
        Instance("loglikelihood", {}, (one.context, one.continuation), one.number, ("mmlu", one.doc_id, 1))
        for one in plan
    ]
    with torch.no_grad():
        theirs = model.loglikelihood(asked, disable_tqdm=True)
    for one, (value, greedy) in zip(plan, theirs, strict=True):
        found = ours[one.key]
        assert found.log_likelihood is not None and math.isclose(found.log_likelihood, value, abs_tol=1e-4)
        assert found.is_greedy == greedy
