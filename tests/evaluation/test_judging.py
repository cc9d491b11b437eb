"""score --judge-url against a server on this host: values, verdicts on disk, kills, and what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.answers import Answered, Head, ShardFile
from megatron_eve.evaluation.judging import FOLDER, IN_FLIGHT, TRIES, Judge, VerdictFile, judge_answers
from megatron_eve.evaluation.measured import Measured
from megatron_eve.evaluation.requests import Request
from megatron_eve.evaluation.scorers.judged import JudgeRow
from megatron_eve.inference import http_client
from megatron_eve.inference.http_client import HTTPClient, ServerError
from megatron_eve.inference.origin import AnswerOrigin
from tests.evaluation import toy_data
from tests.evaluation.judge_server import NAME, JudgeServed, text_of
from tests.inference.openai_server import serving
from tests.inference.test_tools import tool
from tests.test_commands import ROOT

pytest.importorskip("lmms_eval")
from megatron_eve.evaluation.harnesses import Harnesses, versions

TASKS = ("eve_mmvet", "vila_u_msvd_qa")
SAID = ["x = -1", "x = -5", "a guitar", None, "a cow"]
"""What the model says to the two questions of MM-Vet and the three of MSVD-QA."""


def graded(text: str, temperature: float) -> str:
    """The replies of a judge that grades the toy answers."""
    for said, reply in (
        ("x = -1 |", "0.5"), ("x = -5 |", "1.0"), ("a guitar", "{'pred': 'yes', 'score': 5}"),
        ("a cow", "{'pred': 'no', 'score': 1}"),
    ):  # fmt: skip
        if said in text.rpartition("1.0\n\n")[2]:
            return reply
    raise AssertionError(text)


@pytest.fixture
def served() -> Iterator[tuple[str, JudgeServed]]:
    judge = JudgeServed(graded)
    with serving(judge) as (url, _):
        yield url, judge


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "root"
    toy_data.mmvet(folder)
    toy_data.videos(folder)
    toy_data.pope(folder)
    return folder


@pytest.fixture(scope="module")
def evaluate() -> ModuleType:
    return tool("evaluate")


def answer(root: Path, folder: Path, said: Sequence[str | None] = SAID) -> list[Request]:
    """Write answers as a model would have given them."""
    harnesses = Harnesses(TASKS, root)
    data = harnesses.check_data(root.parent / "cache")
    requests = harnesses.plan()
    origin = AnswerOrigin("runs/toy", 7, "00", None, "plain", None, True, None)
    with ShardFile(folder / "shard-0-of-1.jsonl", Head(origin.to_metadata(), data, versions())) as file:
        answers = [
            Answered(text) if text is not None else Answered(error="video_damaged: x") for text in said
        ]
        file.append(zip(requests, answers, strict=True))
    return requests


def score(root: Path, folder: Path, *more: Any, tasks: Sequence[str] = TASKS) -> list[str]:
    flags = [
        "score", "--tasks", ",".join(tasks), "--data-root", root, "--answers", folder, "--data-cache-path",
        root.parent / "cache", "--output", folder.parent / "results.json", *more,
    ]  # fmt: skip
    return [str(one) for one in flags]


def values(folder: Path) -> dict[tuple[str, str], float | None]:
    found = json.loads((folder.parent / "results.json").read_text())["results"]
    return {(one["task"], one["metric"]): one["value"] for one in found}


def verdicts(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in (folder / FOLDER).glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]


def test_values_stand_under_the_name_of_the_judge(
    evaluate: ModuleType, root: Path, tmp_path: Path, served: tuple[str, JudgeServed],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    url, judge = served
    folder = tmp_path / "answers"
    answer(root, folder)
    assert evaluate.main(score(root, folder)) == 3  # one video of three is damaged
    plain = values(folder)
    assert list(plain) == [("eve_mmvet", "submission"), ("vila_u_msvd_qa", "accuracy")]
    capsys.readouterr()

    assert evaluate.main(score(root, folder, "--judge-url", url)) == 3
    found = values(folder)
    by = f"judged by {NAME}"
    assert {name: value for name, value in found.items() if name not in plain} == pytest.approx({
        ("eve_mmvet", by): 75, ("eve_mmvet", f"ocr, {by}"): 50, ("eve_mmvet", f"math, {by}"): 75,
        ("vila_u_msvd_qa", f"accuracy, {by}"): 100 / 3, ("vila_u_msvd_qa", f"score of 5, {by}"): 2,
    })  # fmt: skip
    assert {name: found[name] for name in plain} == plain
    table = capsys.readouterr().out
    (published,) = [line for line in table.splitlines() if "| 30.5" in line]
    assert "submission" in published
    assert f"MM-Vet's prompt, judge {NAME}" in table
    assert f"- vila_u_msvd_qa: judged by {NAME}: 1 answers: the model gave none: scored as wrong" in table
    assert len(judge.asked) == 4  # not of the damaged video
    assert {body["temperature"] for _, body in judge.asked} == {0}

    # Nothing is asked twice; another judge has verdicts of its own; another answer is another question.
    assert evaluate.main(score(root, folder, "--judge-url", url, "--judge-model", NAME)) == 3
    assert len(judge.asked) == 4 and values(folder) == found
    judge.models = [{"id": "other"}]
    assert evaluate.main(score(root, folder, "--judge-url", url)) == 3
    assert len(judge.asked) == 8 and ("eve_mmvet", "judged by other") in values(folder)
    assert [len(path.read_text().splitlines()) for path in (folder / FOLDER).iterdir()] == [4, 4]
    (shard,) = folder.glob("*.jsonl")
    shard.write_text(shard.read_text().replace('"x = -1"', '"x = -5"'))
    assert evaluate.main(score(root, folder, "--judge-url", url)) == 3
    assert len(judge.asked) == 9 and values(folder)["eve_mmvet", "judged by other"] == 100


def judged(count: int, texts: Callable[[int], str] = str) -> tuple[list[Measured], list[Request]]:
    rows = [JudgeRow(number, f"question {number}", "label", texts(number)) for number in range(count)]
    requests = [
        Request("toy", "test", number, 0, "generate", row.question) for number, row in enumerate(rows)
    ]
    return [Measured("toy", "x", None, None, count, "toy", True, judged=rows, judge_rule="mmvet")], requests


def opened(url: str, model: str | None = None) -> Judge:
    client = HTTPClient(url, first_wait=0.01, flag="--judge-url", model_flag="--judge-model")
    return Judge(url, model, client)


def test_replies_that_cannot_be_read_are_asked_again_and_counted(
    served: tuple[str, JudgeServed], tmp_path: Path
) -> None:
    url, judge = served
    judge.say = lambda text, temperature: (
        "0.5" if "question 0 " in text or ("question 1 " in text and temperature >= 1) else "I like it."
    )
    found, in_doubt = judge_answers(*judged(3), opened(url), tmp_path)
    assert [(one.metric, one.value, one.n) for one in found[1:]] == [(f"judged by {NAME}", 50, 2)]
    assert found[1].notes == (
        f"judged by {NAME}: 1 answers: no reply of the judge could be read: not in the values of the judge",
    )
    assert in_doubt == ["toy"]
    tries = {number: [body["temperature"] for _, body in judge.asked if f"question {number} " in text_of(body)]
             for number in range(3)}  # fmt: skip
    assert tries == {0: [0], 1: [0, 0.5, 1.0], 2: [0, 0.5, 1.0, 1.5]} and TRIES == 4
    assert [row["reply"] for row in verdicts(tmp_path)] == ["0.5", "0.5", "I like it."]
    # They are kept, too.
    assert judge_answers(*judged(3), opened(url), tmp_path)[0][1].value == 50
    assert len(judge.asked) == 8
    # One of 200 is not in doubt.
    judge.say = lambda text, temperature: "0" if "question 2 " not in text else "?"
    assert judge_answers(*judged(200), opened(url), tmp_path / "more")[1] == []


def test_a_prompt_that_is_too_long_for_the_judge_is_counted(
    served: tuple[str, JudgeServed], tmp_path: Path
) -> None:
    url, judge = served
    judge.failures = [(400, {}, "This model's maximum context length is 8 tokens.")]
    (_, one), _ = judge_answers(*judged(1), opened(url), tmp_path)
    assert one.value is None and "no reply of the judge could be read" in one.notes[0]
    assert verdicts(tmp_path)[0]["error"].startswith("prompt_too_long: This model's")


def test_strange_answers_are_sent(served: tuple[str, JudgeServed], tmp_path: Path) -> None:
    url, judge = served
    judge.say = lambda text, temperature: "1.0" if "| a\0?\n| |" in text else "0.0"
    (_, one), _ = judge_answers(*judged(1, lambda _: "a\0\ud800\n|"), opened(url), tmp_path)
    assert one.value == 100


def test_torn_lines_and_files_of_others(served: tuple[str, JudgeServed], tmp_path: Path) -> None:
    url, judge = served
    judge.say = lambda text, temperature: "0.5"
    judge_answers(*judged(3), opened(url), tmp_path)
    (path,) = (tmp_path / FOLDER).iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    assert judge_answers(*judged(3), opened(url), tmp_path)[0][1].n == 3
    assert len(judge.asked) == 4 and len(verdicts(tmp_path)) == 3

    with VerdictFile(path, NAME), pytest.raises(DataError, match="another process asks this judge"):
        judge_answers(*judged(3), opened(url), tmp_path)
    whole = path.read_text()
    for text, said in (
        (whole.replace(NAME, "someone"), "line 1: not a verdict of org/judge-7b; remove that line"),
        (f"{whole}[]\n", "line 4: not a verdict"),
        (f"{whole}# notes", "not a file of verdicts"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=said):
            VerdictFile(path, NAME)
        assert path.read_text() == text


def test_pictures_go_to_the_judge(served: tuple[str, JudgeServed], tmp_path: Path) -> None:
    """Yes 0.75 + 0.05 for the first picture; the second is not read."""
    url, judge = served
    share = {"Yes": 0.75, " yes": 0.05, "No": 0.1, "It": 0.1}
    judge.say = lambda text, temperature: share if "cats" in text else "It is hard to say."
    names = []
    for number in range(2):
        names.append(tmp_path / f"{number}.png")
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(names[-1])
    rows = [
        JudgeRow(number, f"two {what}", "", f"{number}.png", ("basic",), names[number])
        for number, what in enumerate(("cats", "dogs"))
    ]
    requests = [Request("toy", "x", number, 0, "generate", row.question) for number, row in enumerate(rows)]
    measured = [Measured("toy", "x", None, None, 2, "toy", True, judged=rows, judge_rule="picture")]
    found, _ = judge_answers(measured, requests, opened(url), tmp_path)
    name = f"probability of yes, judged by {NAME}"
    assert (found[1].metric, found[1].value, found[1].n) == (name, pytest.approx(80), 1)
    body = next(body for _, body in judge.asked if "cats" in str(body))
    image, text = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text["text"] == 'Does this figure show "two cats"? Please answer yes or no.'
    # A picture that was drawn anew is asked about anew; one that is missing is named.
    Image.new("RGB", (8, 8), (9, 9, 9)).save(names[0])
    before = len(judge.asked)
    judge_answers(measured, requests, opened(url), tmp_path)
    assert len(judge.asked) == before + 1
    names[1].write_bytes(b"torn")
    with pytest.raises(DataError, match=r"the picture .*1.png cannot be read \(image_format"):
        judge_answers(measured, requests, opened(url), tmp_path)
    names[1].unlink()
    with pytest.raises(DataError, match=r"the picture .*1.png cannot be read \(No such file"):
        judge_answers(measured, requests, opened(url), tmp_path)


def test_what_is_wrong_with_the_server(
    served: tuple[str, JudgeServed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, judge = served
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    for address, model, said in (
        (down, None, rf"^--judge-url {down}: no answer after \d+ tries \(ConnectError"),
        ("localhost:8000", None, "^--judge-url localhost:8000: not an address such as http://HOST:8000/v1"),
        ("http://me:secret@host/v1", None, "^--judge-url: an address with a user, a password"),
        (
            url.removesuffix("/v1"),
            None,
            "does not list its models; name one with --judge-model, and check the addr",
        ),
        (url, "gpt-4", rf"^--judge-model gpt-4: {url} serves no such model, but {NAME}; name one of these"),
    ):
        with pytest.raises(ServerError, match=said) as caught:
            opened(address, model)
        assert "secret" not in str(caught.value)
    with pytest.raises(
        ServerError, match=r"has no /chat/completions \(status 404: .*--judge-model is the name"
    ):
        judge_answers(*judged(1), opened(url.removesuffix("/v1"), NAME), tmp_path)
    judge.models.append({"id": "b"})
    with pytest.raises(ServerError, match=f"serves b, {NAME}; name one with --judge-model"):
        opened(url)
    judge.lists_models = False
    with pytest.raises(ServerError, match="404: no such model"):
        judge_answers(*judged(1), opened(url, "gpt-4"), tmp_path)
    # What was graded before it went down is kept.
    judge.say, asked = lambda text, temperature: "0.5", judged(2 * IN_FLIGHT)
    original = VerdictFile.append

    def append(self: VerdictFile, given: Any) -> None:
        original(self, given)
        judge.failures = [(503, {}, "gone")] * 1000

    monkeypatch.setattr(VerdictFile, "append", append)
    monkeypatch.setattr(http_client, "TRIES", 2)
    with pytest.raises(
        ServerError, match=r"no answer after 2 tries \(status 503: gone\); when the server runs"
    ):
        judge_answers(*asked, opened(url, NAME), tmp_path)
    assert len([row for row in verdicts(tmp_path) if row["judge"] == NAME]) == IN_FLIGHT
    judge.failures, before = [], len(judge.asked)
    monkeypatch.undo()
    assert judge_answers(*asked, opened(url, NAME), tmp_path)[0][1].n == 2 * IN_FLIGHT
    assert len(judge.asked) - before == IN_FLIGHT


def test_flags(evaluate: ModuleType, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
        "--judge-model: is the name of a server's model and goes with --judge-url": (
            ("--judge-model", "x"),
            TASKS,
        ),
        "--judge-url: no judge is asked about eve_pope; leave it out": (
            ("--judge-url", "http://x/v1"),
            ["eve_pope"],
        ),
    }
    for said, (flags, tasks) in more.items():
        assert evaluate.main(score(root, tmp_path / "answers", *flags, tasks=tasks)) == 2
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error


@pytest.mark.slow
def test_killed_again_and_again(root: Path, tmp_path: Path, served: tuple[str, JudgeServed]) -> None:
    """SIGKILL while verdicts come: the same values at the end, and no verdict that was on disk is asked for again."""
    url, judge = served
    judge.say = lambda text, temperature: time.sleep(0.3) or graded(text, temperature)  # type: ignore[func-returns-value]
    folder = tmp_path / "answers"
    answer(root, folder)
    command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), *score(root, folder, "--judge-url", url)]
    kills = 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(judge.asked)
        while process.poll() is None and len(judge.asked) == before:
            time.sleep(0.01)
        time.sleep(0.15 * (kills % 3))
        if kills < 4 and process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert process.wait() == 3
        break
    assert kills == 4 and values(folder)["eve_mmvet", f"judged by {NAME}"] == 75
    rows = verdicts(folder)
    assert len({row["key"] for row in rows}) == len(rows) == 4
