"""The file of a shard's answers: what is on disk counts, by whole batches, and nothing else is taken for an answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_eve.curation.caption_answers import CaptionAnswer, CaptionAnswers
from megatron_eve.data.errors import DataError

ROWS = [2, 3, 5, 8, 13, 21, 34]
ANSWERS = [CaptionAnswer(row, f"prompt {row}", f"two\nlines, {row} \ud83d\u2028") for row in ROWS[:5]]
ANSWERS += [CaptionAnswer(21, reason="image_truncated", detail="half"), CaptionAnswer(34)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with CaptionAnswers(tmp_path / "caption" / "00000.jsonl", ROWS, 3) as answers:
        assert answers.missing == ROWS
        for start in (0, 3, 6):
            answers.append(ANSWERS[start : start + 3])
        assert not answers.missing and answers.found == ANSWERS
        return answers.path


def test_answers_come_back(path: Path) -> None:
    before = path.read_bytes()
    with CaptionAnswers(path, ROWS, 3) as answers:
        assert answers.found == ANSWERS and not answers.missing
    assert path.read_bytes() == before


def test_after_a_kill_at_any_byte_the_same_file_comes_out(path: Path) -> None:
    whole = path.read_bytes()
    for size in range(0, len(whole), 13):
        path.write_bytes(whole[:size])
        with CaptionAnswers(path, ROWS, 3) as answers:
            done = len(answers.found)
            assert done == whole[:size].count(b"\n") // 3 * 3
            assert answers.missing == ROWS[done:]
            answers.append(ANSWERS[done:])
        assert path.read_bytes() == whole


def test_another_batch_size_keeps_what_are_whole_batches_of_it(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])  # six lines, and a torn one
    with CaptionAnswers(path, ROWS, 4) as answers:
        assert answers.missing == ROWS[4:]


@pytest.mark.parametrize(
    ("content", "rows", "said"),
    [
        (b"hello\n", ROWS, "line 1: is not an answer of a captioning model; remove the file"),
        (b"[]\n", ROWS, "line 1: is not an answer of a captioning model"),
        (b'{"row": 2, "text": "x"}\n', ROWS, "line 1: is not an answer of a captioning model"),
        (None, ROWS[:4], "line 5: is the answer to row 13, which is not next among the rows"),
        (None, [2, 4, *ROWS[2:]], "line 2: is the answer to row 3, which is not next among the rows"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left(
    path: Path, content: bytes | None, rows: list[int], said: str
) -> None:
    if content is not None:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"00000\.jsonl") as raised:
        CaptionAnswers(path, rows, 3)
    assert said in str(raised.value) and path.read_bytes() == before


def test_two_processes_do_not_write_one_file(path: Path) -> None:
    with (
        CaptionAnswers(path, ROWS, 3),
        pytest.raises(DataError, match="another process is writing it; wait until it has ended"),
    ):
        CaptionAnswers(path, ROWS, 3)
