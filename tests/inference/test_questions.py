"""Question files, answers that survive a kill, and a run that goes on past a damaged picture."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.data.errors import DataError
from megatron_eve.data.images import ImageError
from megatron_eve.inference.answering import AnswerCounts, answer_questions
from megatron_eve.inference.engine import Answer, ContinuationQuery, LogLikelihood, PromptError, Query
from megatron_eve.inference.origin import AnswerOrigin
from megatron_eve.inference.questions import AnswersFile, Question, chunk, read_questions
from megatron_eve.inference.sampling import GREEDY, Sampling
from megatron_eve.models.text_format import PLAIN, VICUNA_V1

ORIGIN = AnswerOrigin("runs/eve", 100, "a" * 64, "b" * 64, "vicuna_v1", 8, True)


class Killed(Exception):
    """Stands for a kill."""


class Echo:
    """An engine that says how long its prompt is; it is killed when it has answered `patience` batches."""

    max_length, conv_mode = 1000, "vicuna_v1"

    def __init__(self, patience: int = 1000) -> None:
        self.patience, self.batches = patience, []

    def prepare(
        self, text: str, images: Sequence[bytes], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> Query:
        if b"damaged" in images:
            raise ImageError("image_damaged", "JPEG does not decode")
        if "very long" in text:
            raise PromptError("prompt_too_long", "1,200 tokens")
        return Query(text, tuple(images), len(text), max_new_tokens, tuple(stop))

    def answers(self, queries: Sequence[Query], sampling: Sampling = GREEDY) -> list[Answer]:
        if not self.patience:
            raise Killed
        self.patience -= 1
        self.batches.append(len(queries))
        return [Answer((1, 2), f"{len(query.images)} in {query.length}, é") for query in queries]

    def stream(self, query: Query, sampling: Sampling = GREEDY) -> Generator[str, None, None]:
        yield "unused"

    def prepare_continuation(
        self, text: str, images: Sequence[bytes], continuation: str
    ) -> ContinuationQuery:
        raise NotImplementedError

    def log_likelihoods(self, queries: Sequence[ContinuationQuery]) -> list[LogLikelihood]:
        raise NotImplementedError


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


def questions_of(file: Path) -> list[Question]:
    found = read_questions(file, VICUNA_V1)
    assert not found.refused
    return found.questions


def answer(
    file: Path,
    engine: Echo,
    batch_size: int = 2,
    target: str = "answers.jsonl",
    origin: AnswerOrigin = ORIGIN,
    images: Path | None = None,
) -> AnswerCounts:
    folder = images or file.parent
    with AnswersFile(file.parent / target, questions_of(file), origin, folder) as answers:
        return answer_questions(
            engine, answers, folder, batch_size=batch_size, max_new_tokens=8, done=lambda count: None
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
    assert found[0]["prompt"] == "What?" and found[0]["model_id"] == "eve"
    assert found[0]["metadata"] == {
        "images": [{"name": "a.jpg", "sha256": hashlib.sha256(b"a").hexdigest()}],
        "model_path": "runs/eve",
        "iteration": 100,
        "model_sha256": "a" * 64,
        "tokenizer_sha256": "b" * 64,
        "conv_mode": "vicuna_v1",
        "max_new_tokens": 8,
        "apply_exif": True,
        "sampling": None,
    }
    assert [row["text"].split(" ")[0] for row in found] == ["1", "2", "0", "", "1", "", ""]
    assert found[3]["metadata"]["error"] == "image_damaged: JPEG does not decode"
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
    with AnswersFile(path, questions_of(file), ORIGIN, file.parent) as answers:
        assert [question.id for question in answers.missing] == [6]
        assert (answers.resumed, answers.damaged) == (6, 2)
    assert answer(file, Echo()).answered == 1
    assert rows(path)[-1]["question_id"] == 6


def refused(file: Path, origin: AnswerOrigin = ORIGIN, images: Path | None = None) -> str:
    """What is said of an answers file, which is left as it is."""
    path = file.parent / "answers.jsonl"
    before = path.read_bytes()
    with pytest.raises(DataError) as error:
        answer(file, Echo(patience=0), origin=origin, images=images)
    assert path.read_bytes() == before
    return str(error.value)


def test_one_process_at_a_time_and_only_answers_to_these_questions(file: Path) -> None:
    questions, path = questions_of(file), file.parent / "answers.jsonl"
    with (
        AnswersFile(path, questions, ORIGIN, file.parent),
        pytest.raises(DataError, match="another process is writing it"),
    ):
        AnswersFile(path, questions, ORIGIN, file.parent)
    answer(file, Echo())
    good = rows(path)[0]
    for content, message in (
        ([good, {**good, "prompt": "Why?"}], "line 2: this answer is to a question that this run does not"),
        ([good, "{}"], "line 2: not an answer of tools/generate.py; give this run another --answers-file"),
        ([{**good, "metadata": []}], "line 1: not an answer"),
        ([{**good, "question_id": []}], "line 1: not an answer"),
        ([{**good, "model_id": "eve-2"}], "line 1: this answer came from eve-2, and this run's model is eve"),
        (["cut off", good], "line 1: not an answer"),
        ([{**good, "metadata": {}}], "line 1: this answer does not say which model"),
    ):
        write(path, *content)
        assert message in refused(file)


def test_a_file_that_holds_no_answers_is_left_as_it_is(file: Path) -> None:
    """Such as the question file itself, even without a line end, where a torn row would be cut off."""
    path = file.parent / "answers.jsonl"
    for content in (
        file.read_bytes().rstrip(),
        json.dumps(GOOD).encode(),
        b"\x89PNG\r\n\x1a\nIHDR",
        b"notes",
    ):
        path.write_bytes(content)
        assert "answer" in refused(file)
    path.unlink()
    answer(file, Echo())
    whole = path.read_bytes()
    path.write_bytes(whole.rstrip())  # by an editor
    assert answer(file, Echo(patience=0)).answered == 0
    assert path.read_bytes() == whole


def test_answers_of_another_model_or_made_otherwise_are_not_taken_for_this_runs(file: Path) -> None:
    """The model by its weights: two folders may have one name, and one folder another iteration."""
    answer(file, Echo())
    for changes, message in (
        (
            {"model_sha256": "c" * 64, "model_path": "b/eve"},
            "came from runs/eve, iteration 100 (sha256 aaaaaa",
        ),
        ({"model_sha256": "c" * 64, "iteration": 200}, "names runs/eve, iteration 200 (sha256 cccccc"),
        ({"tokenizer_sha256": "c" * 64}, "was made with another --tokenizer-model"),
        ({"conv_mode": "plain"}, "was made with --conv-mode vicuna_v1"),
        ({"max_new_tokens": 9}, "was made with --max-new-tokens 8"),
        ({"apply_exif": False}, "was made with no --ignore-exif-orientation"),
        (
            {"sampling": {"temperature": 0.7, "seed": 3}},
            "was made with --temperature 0, as greedy answers are",
        ),
    ):
        message_given = refused(file, origin=replace(ORIGIN, **changes))
        assert message in message_given and message_given.endswith("; give this run another --answers-file")
    assert answer(file, Echo(patience=0), origin=replace(ORIGIN, model_path="moved/eve")).answered == 0


def test_an_answer_to_another_picture_is_not_taken_for_this_ones(file: Path, tmp_path: Path) -> None:
    """Neither another name under the same question nor other bytes under the same name."""
    answer(file, Echo())
    asked = file.read_text()
    file.write_text(asked.replace('"image": "a.jpg"', '"image": "b.jpg"'))
    assert "line 1: this answer is about a.jpg, not b.jpg; give this run another" in refused(file)
    file.write_text(asked.replace(', "image": "a.jpg"', "").replace('"image": "a.jpg", ', ""))
    assert "line 1: this answer is about a.jpg, not no picture" in refused(file)
    file.write_text(asked)
    others = tmp_path / "others"
    others.mkdir()
    assert answer(file, Echo(patience=0), images=others).answered == 0  # nothing there that says otherwise
    (others / "b.jpg").write_bytes(b"another one")
    assert "line 2: this answer is about another picture than b.jpg is now" in refused(file, images=others)


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
        ('{"question_id": "\\ud800"}', "half of a surrogate pair"),
        ('{"question_id": ' + "9" * 5000 + "}", "line 3"),
        ("[" * 100_000, "line 3"),
        ('{"question_id": 2, "text": "a\x00b"}', "Invalid control character"),
        ("\xff", "not UTF-8 text (byte 1 of the line)"),
        ('{"question_id": 2, "text": "caf\xe9"}', "not UTF-8 text (byte 32 of the line)"),
    ],
)
def test_a_line_that_is_no_question_is_named_and_the_others_are_kept(
    tmp_path: Path, row: Any, message: str
) -> None:
    path = tmp_path / "questions.jsonl"
    lines = [
        json.dumps(GOOD),
        "",
        row if isinstance(row, str) else json.dumps(row),
        '{"question_id": 9, "text": "So?"}',
    ]
    path.write_bytes("\n".join(lines).encode("latin-1"))
    found = read_questions(path, VICUNA_V1)
    assert [question.id for question in found.questions] == [1, 9]
    (line,) = found.refused
    assert line.startswith(f"{path}, line 3: ") and message in line


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 2, "image": "a.jpg"}, 'no "text"'),
        ({"question_id": 2, "image": "a.jpg", "text": " \n"}, 'no "text"'),
        ({"question_id": 2, "image": {"a": 1}, "text": "What?"}, '"image" is neither'),
        ({"question_id": 2, "image": [""], "text": "What?"}, '"image" is neither'),
        ({"question_id": 2, "text": "What is <image>?"}, "placeholder_without_image"),
        ({**GOOD, "question_id": 2, "text": "<image> and <image>"}, "image_count"),
        ('{"question_id": 2, "text": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_question_that_cannot_be_asked_gets_a_row_that_says_so(
    tmp_path: Path, row: Any, message: str
) -> None:
    path = write(tmp_path / "questions.jsonl", {"question_id": 1, "text": "What?"}, row)
    tally = answer(path, Echo())
    assert (tally.answered, tally.skipped) == (1, {"bad_question": 1})
    found = rows(tmp_path / "answers.jsonl")
    assert [row["question_id"] for row in found] == [1, 2] and found[1]["text"] == ""
    error = found[1]["metadata"]["error"]
    assert error.startswith("bad_question: ") and message in error
    assert answer(path, Echo(patience=0)).answered == 0
    write(path, {"question_id": 1, "text": "What?"}, {"question_id": 2, "text": "Mended?"})
    assert "line 2: this answer is to a question" in (said := refused(path)) and "remove that row, or" in said


def test_pictures_with_odd_names_are_looked_for_and_reported(tmp_path: Path) -> None:
    (tmp_path / "a b'\u732b\n.jpg").write_bytes(b"there")
    names = ["a b'\u732b\n.jpg", "a\x00.jpg", "x" * 5000, ".", "no/where.jpg", "\u202egpj.exe"]
    os.mkfifo(tmp_path / "pipe")  # would be waited for
    asked = [{"question_id": n, "image": name, "text": "?"} for n, name in enumerate([*names, "pipe"])]
    tally = answer(write(tmp_path / "questions.jsonl", *asked), Echo())
    assert (tally.answered, tally.skipped) == (1, {"image_missing": 6})


def test_a_file_without_a_single_question_is_refused(tmp_path: Path) -> None:
    path, good = tmp_path / "questions.jsonl", json.dumps(GOOD)
    for content, message in (
        (b"", "questions.jsonl: is empty; no line of it is a question: write each as an object"),
        (f"[{good}]".encode(), "line 1: a JSON list, not an object; no line of it"),
        (json.dumps(GOOD, indent=1).encode(), "line 1: Expecting property name"),
        (good.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            read_questions(path, VICUNA_V1)
        assert message in str(error.value)


def test_windows_line_ends_a_byte_order_mark_and_a_last_line_without_an_end(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    lines = [json.dumps({**GOOD, "question_id": n}) for n in (1, 2)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    assert [question.id for question in questions_of(path)] == [1, 2]


def test_plain_needs_no_text_and_ignores_it(tmp_path: Path) -> None:
    path = write(tmp_path / "q", {"question_id": 1, "image": ["a", "b"]}, {**GOOD, "question_id": 2})
    assert [question.prompt for question in read_questions(path, PLAIN).questions] == [
        "<image><image>",
        "<image>",
    ]


def test_shards_are_the_published_ones_and_leave_nothing_out() -> None:
    for total in range(9):
        some = [Question(i, (), "", "") for i in range(total)]
        for count in range(1, 6):
            shards = [chunk(some, count, index) for index in range(count)]
            assert [question for shard in shards for question in shard] == some
            size = -(-total // count)
            assert all(len(shard) <= size for shard in shards)


def test_questions_with_pictures_may_join_those_about_text() -> None:
    """The answers of text alone had no tower; another tower is another answer."""
    with_tower = replace(ORIGIN, tower_sha256="c" * 64)
    assert with_tower.difference(ORIGIN.to_metadata()) is None
    assert ORIGIN.difference(with_tower.to_metadata()) is None
    other = replace(ORIGIN, tower_sha256="d" * 64)
    assert other.difference(with_tower.to_metadata()) == "was made with another --tower"
