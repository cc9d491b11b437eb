"""Question files, answers that survive a kill, and a run that goes on past a damaged picture."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.data.errors import DataError
from megatron_eve.data.images import ImageError
from megatron_eve.inference.answering import Tally, answer_questions
from megatron_eve.inference.engine import Answer, PromptError, Query
from megatron_eve.inference.questions import AnswersFile, Question, chunk, read_questions


class Killed(Exception):
    """Stands for a kill."""


class Echo:
    """An engine that says how long its prompt is; it is killed when it has answered `patience` batches."""

    max_length = 1000

    def __init__(self, patience: int = 1000) -> None:
        self.patience, self.batches = patience, []

    def prepare(self, text: str, images: Sequence[bytes], max_new_tokens: int) -> Query:
        if b"damaged" in images:
            raise ImageError("image_damaged", "JPEG does not decode")
        if "very long" in text:
            raise PromptError("prompt_too_long", "1,200 tokens")
        return Query(text, tuple(images), len(text))

    def answers(self, queries: Sequence[Query], max_new_tokens: int) -> list[Answer]:
        if not self.patience:
            raise Killed
        self.patience -= 1
        self.batches.append(len(queries))
        return [Answer((1, 2), f"{len(query.images)} in {query.length}, é") for query in queries]

    def stream(self, query: Query, max_new_tokens: int) -> Generator[str, None, None]:
        yield "unused"


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    (tmp_path / "bad.jpg").write_bytes(b"damaged")
    return write(
        tmp_path / "questions.jsonl",
        {"question_id": 1, "image": "a.jpg", "text": "What?", "category": "kept out"},
        {"question_id": 2, "image": ["a.jpg", "b.jpg"], "text": "Both?"},
        {"question_id": "3", "text": "No picture?"},
        {"question_id": "mme/1.png", "image": "bad.jpg", "text": "First?"},
        {"question_id": "mme/1.png", "image": "b.jpg", "text": "Second?"},
        {"question_id": 6, "image": "missing.jpg", "text": "?"},
        {"question_id": 7, "text": "A very long one"},
    )


def answer(file: Path, engine: Echo, batch_size: int = 2, target: str = "answers.jsonl") -> Tally:
    questions = read_questions(file, "vicuna_v1")
    with AnswersFile(file.parent / target, questions, "eve") as answers:
        return answer_questions(
            engine, answers, file.parent, batch_size=batch_size, max_new_tokens=8, done=lambda count: None
        )


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_question_gets_its_row_in_order(file: Path) -> None:
    tally = answer(file, Echo())
    assert (tally.answered, tally.tokens) == (4, 8)
    assert tally.skipped == {"image_damaged": 1, "image_missing": 1, "prompt_too_long": 1}
    found = rows(file.parent / "answers.jsonl")
    assert [row["question_id"] for row in found] == [1, 2, "3", "mme/1.png", "mme/1.png", 6, 7]
    assert list(found[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert found[0]["prompt"] == "What?" and found[0]["model_id"] == "eve" and found[0]["metadata"] == {}
    assert [row["text"].split(" ")[0] for row in found] == ["1", "2", "0", "", "1", "", ""]
    assert found[3]["metadata"] == {"error": "image_damaged: JPEG does not decode"}
    assert found[5]["metadata"]["error"].startswith("image_missing: missing.jpg: No such file")
    assert len({row["answer_id"] for row in found}) == 7


@pytest.mark.parametrize("torn", ["", '{"question_id": 2, "te', "\x00\x00", '{"question_id": "3"'])
def test_a_killed_run_goes_on_to_the_same_file(file: Path, torn: str) -> None:
    answer(file, Echo(), target="whole.jsonl")
    with pytest.raises(Killed):
        answer(file, Echo(patience=1), batch_size=1)
    path = file.parent / "answers.jsonl"
    assert len(rows(path)) == 1
    with path.open("a") as end:
        end.write(torn)
    engine = Echo()
    tally = answer(file, engine, batch_size=3)
    assert tally.answered == 3 and sum(engine.batches) == 3
    assert path.read_bytes() == (file.parent / "whole.jsonl").read_bytes()
    assert answer(file, Echo(patience=0)).answered == 0


def test_a_row_that_is_removed_is_asked_again(file: Path) -> None:
    answer(file, Echo())
    path = file.parent / "answers.jsonl"
    path.write_text(
        "".join(line + "\n" for line in path.read_text().splitlines() if "image_missing" not in line)
    )
    (file.parent / "missing.jpg").write_bytes(b"there")
    with AnswersFile(path, read_questions(file, "vicuna_v1"), "eve") as answers:
        assert [question.id for question in answers.missing] == [6]
        assert (answers.resumed, answers.damaged) == (6, 2)
    assert answer(file, Echo()).answered == 1
    assert rows(path)[-1]["question_id"] == 6


def test_one_process_at_a_time_and_only_answers_of_this_model_to_these_questions(file: Path) -> None:
    questions, path = read_questions(file, "vicuna_v1"), file.parent / "out" / "answers.jsonl"
    with (
        AnswersFile(path, questions, "eve"),
        pytest.raises(DataError, match="another process is writing it"),
    ):
        AnswersFile(path, questions, "eve")
    answered = {"question_id": 1, "prompt": "What?", "text": "", "model_id": "eve", "metadata": {}}
    for content, message in (
        ([answered, {**answered, "prompt": "Why?"}], r"answers.jsonl, line 2: an answer to a question that"),
        ([answered, "{}"], r"answers.jsonl, line 2: not an answer"),
        ([{**answered, "model_id": "eve-2"}], r"answers.jsonl, line 1: an answer of eve-2; give eve another"),
        (["cut off", answered], r"answers.jsonl, line 1: not an answer"),
    ):
        write(path, *content)
        before = path.read_bytes()
        with pytest.raises(DataError, match=message):
            AnswersFile(path, questions, "eve")
        assert path.read_bytes() == before


GOOD = {"question_id": 1, "image": "a.jpg", "text": "What?"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{'question_id': 1}", "Expecting property name"),
        ("[1]", "a JSON list, not an object"),
        ({"image": "a.jpg", "text": "What?"}, 'no "question_id"'),
        ({**GOOD, "question_id": True}, 'no "question_id"'),
        ({**GOOD, "question_id": None}, 'no "question_id"'),
        (GOOD, "the same question_id and text as in line 1"),
        ({"question_id": 2, "image": "a.jpg"}, 'no "text"'),
        ({"question_id": 2, "image": {"a": 1}, "text": "What?"}, '"image" is neither'),
        ({"question_id": 2, "image": [""], "text": "What?"}, '"image" is neither'),
        ({"question_id": 2, "text": "What is <image>?"}, "placeholder_without_image"),
        ({**GOOD, "question_id": 2, "text": "<image> and <image>"}, "image_count"),
        ('{"question_id": 2, "text": "\\ud800"}', "half of a surrogate pair"),
        ("[" * 100_000, "line 3"),
        ("\xff", "line 3"),
    ],
)
def test_a_bad_question_is_named_by_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    lines = [json.dumps(GOOD), "", row if isinstance(row, str) else json.dumps(row)]
    path.write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(DataError, match=r"questions\.jsonl, line 3: ") as found:
        read_questions(path, "vicuna_v1")
    assert message in str(found.value)


def test_plain_needs_no_text_and_ignores_it(tmp_path: Path) -> None:
    path = write(tmp_path / "q", {"question_id": 1, "image": ["a", "b"]}, {**GOOD, "question_id": 2})
    assert [question.prompt for question in read_questions(path, "plain")] == ["<image><image>", "<image>"]


def test_shards_are_the_published_ones_and_leave_nothing_out() -> None:
    for total in range(9):
        some = [Question(i, (), "", "") for i in range(total)]
        for count in range(1, 6):
            shards = [chunk(some, count, index) for index in range(count)]
            assert [question for shard in shards for question in shard] == some
            size = -(-total // count)
            assert all(len(shard) <= size for shard in shards)
