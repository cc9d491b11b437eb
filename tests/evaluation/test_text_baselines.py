"""The tasks of text through baselines: a LLaVA of random weights by transformers, and the same behind a server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_eve.config import ConfigError
from megatron_eve.evaluation.answers import Answered, Head, ShardFile, read_answers
from megatron_eve.evaluation.requests import Request
from tests.evaluation.test_text_harness import main_value, opened
from tests.evaluation.test_text_harness import root as root  # the fixture

pytest.importorskip("lm_eval")

from megatron_eve.evaluation.answering import answer_requests
from megatron_eve.inference.engine import Engine
from megatron_eve.inference.http_client import HTTPClient
from megatron_eve.inference.http_engine import HTTPEngine
from megatron_eve.inference.transformers_engine import TransformersEngine
from tests.inference.baseline_models import make_llava
from tests.inference.openai_server import serving

pytestmark = pytest.mark.slow  # 57 datasets of MMLU and 27 of BBH take seconds to write and to open
NEW_TOKENS = 24  # the model writes on for ever


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    """With room for the three shots of BBH, whose texts are the published ones."""
    folder = make_llava(tmp_path_factory.mktemp("llava"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 16_384
    (folder / "config.json").write_text(json.dumps(config))
    return TransformersEngine(folder)


def answered(engine: Engine, plan: Sequence[Request], folder: Path) -> dict[str, Answered]:
    with ShardFile(folder / "shard-0-of-1.jsonl", Head({}, {})) as file:
        counts = answer_requests(engine, plan, file, 8, lambda count: None)
    assert counts.answered == len(plan) and not counts.errors
    return read_answers(folder, "--answers").found


def logits(engine: TransformersEngine, ids: Sequence[int]) -> Any:
    with torch.no_grad():
        return engine._model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


def likelihood(engine: TransformersEngine, context: str, continuation: str) -> float:
    """By one forward pass over both."""
    tokenizer = engine._processor.tokenizer
    ids, before = tokenizer(context + continuation).input_ids, len(tokenizer(context).input_ids)
    scores = logits(engine, ids)
    return sum(float(scores[at - 1, ids[at]]) for at in range(before, len(ids)))


def generated(engine: TransformersEngine, text: str, stop: Sequence[str]) -> str:
    """By `generate`, cut where the first stop text begins."""
    tokenizer = engine._processor.tokenizer
    ids = tokenizer(text, return_tensors="pt").input_ids
    new = engine._model.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
    said = tokenizer.decode(new, skip_special_tokens=True)
    return said[: min((at for one in stop if (at := said.find(one)) >= 0), default=len(said))].strip()


def test_bbh_and_drop_are_generated_here_and_by_a_server(
    root: Path, engine: TransformersEngine, tmp_path: Path
) -> None:
    plan = opened(root, "bbh_cot_fewshot").plan()[::18] + opened(root, "drop").plan()
    plan = [replace(one, max_new_tokens=NEW_TOKENS) for one in plan]
    here = answered(engine, plan, tmp_path / "here")
    for one in plan:
        assert here[one.key].text == generated(engine, one.context, one.stop), one
    assert len({one.text for one in here.values()}) > 2
    with serving(engine) as (url, served):
        remote = HTTPEngine(url, "tiny", client=HTTPClient(url, first_wait=0.01))
        assert answered(remote, plan, tmp_path / "there") == here
    assert {path for path, _ in served.asked} == {"/v1/completions"}


def test_mmlu_is_scored_by_the_likelihoods_of_its_choices(
    root: Path, engine: TransformersEngine, tmp_path: Path
) -> None:
    harnesses = opened(root, "mmlu")
    plan = harnesses.plan()
    here = answered(engine, plan, tmp_path / "here")
    right = 0
    rows: dict[tuple[str, int], list[Request]] = {}
    for one in plan:
        rows.setdefault((one.split, one.doc_id), []).append(one)
    for (_, row), choices in list(rows.items()):
        values = [here[one.key].log_likelihood for one in choices]
        right += max(range(4), key=values.__getitem__) == row % 4  # type: ignore[arg-type]
    assert main_value(harnesses, here) == pytest.approx(right / len(rows)) and 0 < right < len(rows)
    some = [one for one in plan if one.split in ("mmlu_anatomy", "mmlu_virology")]
    wanted = [likelihood(engine, one.context, one.continuation) for one in some]
    assert [here[one.key].log_likelihood for one in some] == pytest.approx(wanted, abs=1e-4)
    with serving(engine) as (url, _):
        remote = HTTPEngine(url, "tiny", client=HTTPClient(url, first_wait=0.01))
        there = answered(remote, some, tmp_path / "there")
    assert [there[one.key].log_likelihood for one in some] == pytest.approx(wanted, abs=1e-4)
    assert [there[one.key].is_greedy for one in some] == [here[one.key].is_greedy for one in some]


def test_in_the_chat_template_a_folder_is_asked_and_a_server_says_that_it_cannot(
    root: Path, engine: TransformersEngine, tmp_path: Path
) -> None:
    plan = [one for one in opened(root, "mmlu_chat").plan() if one.split == "mmlu_anatomy"]
    here = answered(engine, plan, tmp_path / "here")
    for one in plan:
        messages = [
            {"role": said["role"], "content": [{"type": "text", "text": said["content"]}]}
            for said in json.loads(one.context)
        ]
        text = engine._processor.apply_chat_template(messages, add_generation_prompt=True)
        assert text.count("USER:") == 6
        wanted = likelihood(engine, text, one.continuation)
        assert here[one.key].log_likelihood == pytest.approx(wanted, abs=1e-4)
    with serving(engine) as (url, served):
        remote = HTTPEngine(url, "tiny", client=HTTPClient(url, first_wait=0.01))
        with pytest.raises(
            ConfigError, match="gives no log-likelihoods of messages; take tasks that generate"
        ):
            answered(remote, plan, tmp_path / "there")
        assert not served.asked
        drop = [replace(one, max_new_tokens=NEW_TOKENS) for one in opened(root, "drop_chat").plan()]
        said = answered(remote, drop, tmp_path / "drop_there")
    assert said == answered(engine, drop, tmp_path / "drop_here")
    assert {path for path, _ in served.asked} == {"/v1/chat/completions"}
