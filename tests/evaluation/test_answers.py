"""Answers on disk: what is appended, what is read, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.answers import (
    Answered,
    Head,
    ShardFile,
    check_data,
    check_head,
    missing_by_task,
    read_answers,
)
from megatron_eve.evaluation.requests import Request, of_shard
from megatron_eve.inference.origin import AnswerOrigin

MODEL = AnswerOrigin("/runs/one", 100, "ab" * 32, "cd" * 32, "vicuna_v1", None, True).to_metadata()
HEAD = Head(MODEL, {"owner/POPE": "data 1"}, {"torch": "2"})
HOSTILE = "\0 half \ud83d <b> \u2028 \n \r " + "long " * 2_000_000


def requests(count: int, task: str = "pope", **more: Any) -> list[Request]:
    return [
        Request(task, "test", row, 0, "generate", f"question {row}", max_new_tokens=8, **more)
        for row in range(count)
    ]


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    asked = requests(3)
    likely = replace(asked[0], kind="log_likelihood", continuation=" B")
    with ShardFile(tmp_path / "a.jsonl", HEAD) as file:
        file.append(
            [(asked[0], Answered("Yes", images=("12",))), (asked[1], Answered(error="prompt_too_long: 9"))]
        )
    with ShardFile(tmp_path / "b.jsonl", HEAD) as file:
        file.append([(likely, Answered(log_likelihood=-1.25, is_greedy=True))])
    answers = read_answers(tmp_path, "--answers")
    assert answers.head == HEAD and len(answers.found) == 3
    assert answers.found[asked[0].key] == Answered("Yes", images=("12",))
    assert answers.found[asked[1].key].error == "prompt_too_long: 9"
    assert answers.found[likely.key] == Answered(log_likelihood=-1.25, is_greedy=True)
    assert missing_by_task([*asked, likely], answers.found) == {"pope": 1}


def test_any_text_fits_a_line(tmp_path: Path) -> None:
    hostile = Request("t\0", "test", 0, 0, "generate", HOSTILE)
    with ShardFile(tmp_path / "a.jsonl", HEAD) as file:
        file.append([(hostile, Answered(HOSTILE)), *((one, Answered("x")) for one in requests(1))])
    assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == 3
    found = read_answers(tmp_path, "--answers").found
    assert found[hostile.key].text == HOSTILE and len(found) == 2


@pytest.mark.parametrize("changed", [
    {"task": "mme"}, {"split": "val"}, {"doc_id": 9}, {"number": 1}, {"kind": "log_likelihood"}, {"context": "other"},
    {"continuation": " A"}, {"max_new_tokens": 9}, {"stop": ("\n",)}, {"shots": 5}, {"conversation": list},
], ids=lambda changed: next(iter(changed)))  # fmt: skip
def test_the_key_names_all_that_an_answer_depends_on(changed: dict[str, Any]) -> None:
    (one,) = requests(1)
    assert replace(one, **changed).key != one.key == requests(1)[0].key


def test_shards_share_the_rows_out(tmp_path: Path) -> None:
    asked = [replace(one, number=number) for one in requests(7) for number in range(4)]
    for shards in (1, 2, 3, 8):
        parts = [of_shard(asked, shard, shards) for shard in range(shards)]
        assert sorted(one.key for part in parts for one in part) == sorted(one.key for one in asked)
        assert max(map(len, parts)) - min(map(len, parts)) <= 4
        for part in parts:  # the requests of a row stay together, and in order
            assert part == sorted(part, key=lambda one: (one.doc_id, one.number))
            assert len(part) == 4 * len({one.doc_id for one in part})


@pytest.mark.parametrize("torn", [b'{"key": "12", "te', b'{"he', b"\0\0\0\0", b'{"key": "1"}\n'[:-1]])
def test_a_torn_last_line_goes(torn: bytes, tmp_path: Path) -> None:
    path, asked = tmp_path / "a.jsonl", requests(2)
    with ShardFile(path, HEAD) as file:
        file.append([(asked[0], Answered("Yes"))])
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert read_answers(tmp_path, "--answers").found.keys() == {asked[0].key}
    with ShardFile(path, HEAD) as file:
        file.append([(asked[1], Answered("No"))])
    assert path.read_bytes().startswith(whole)
    assert read_answers(tmp_path, "--answers").found.keys() == {one.key for one in asked}


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with (
        ShardFile(tmp_path / "a.jsonl", HEAD),
        pytest.raises(DataError, match="another process is writing it; give"),
    ):
        ShardFile(tmp_path / "a.jsonl", HEAD)
    with ShardFile(tmp_path / "a.jsonl", HEAD):
        pass


def test_a_file_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"my notes")
    with pytest.raises(DataError, match=r"a\.jsonl: not an answers file"):
        ShardFile(path, HEAD)
    assert path.read_bytes() == b"my notes"
    for line in (b"my notes\n", b'{"a": 1}\n', b"[1]\n", b'{"key": 1}\n', b'{"head": {"model": 1}}\n'):
        path.write_bytes(line)
        with pytest.raises(DataError, match=r"a\.jsonl, line 1: not an answer of tools/evaluate.py"):
            read_answers(tmp_path, "--answers")


def test_more_tasks_add_their_data_to_the_head(tmp_path: Path) -> None:
    other = replace(HEAD, data={"owner/MME": "data 2"})
    for head in (HEAD, other, HEAD, other):
        ShardFile(tmp_path / "a.jsonl", head).__exit__()
    assert (tmp_path / "a.jsonl").read_text().count("head") == 2
    found = read_answers(tmp_path, "--answers").head
    assert found is not None and found.data == {**HEAD.data, **other.data}


@pytest.mark.parametrize(("field", "value", "said"), [
    ("model_sha256", "ef" * 32, "came from /runs/one, iteration 100"),
    ("conv_mode", "plain", "was made with --conv-mode"),
    ("apply_exif", False, "ignore-exif-orientation"),
    ("tokenizer_sha256", "00" * 32, "another --tokenizer-model"),
])  # fmt: skip
def test_two_models_are_refused(field: str, value: object, said: str, tmp_path: Path) -> None:
    ShardFile(tmp_path / "a.jsonl", HEAD).__exit__()
    other = replace(HEAD, model={**MODEL, field: value})
    with pytest.raises(DataError, match=f"--answers .*{said}.*; name another folder"):
        check_head(read_answers(tmp_path, "--answers").head, other, tmp_path)
    ShardFile(tmp_path / "b.jsonl", other).__exit__()
    with pytest.raises(
        DataError, match=r"b\.jsonl, line 1: the answers of another file of this folder differ"
    ):
        read_answers(tmp_path, "--answers")


def test_the_same_model_in_another_folder_is_the_same(tmp_path: Path) -> None:
    moved = replace(HEAD, model={**MODEL, "model_path": "/elsewhere"}, versions={"torch": "3"})
    check_head(HEAD, moved, tmp_path)


def test_changed_data_is_refused(tmp_path: Path) -> None:
    ShardFile(tmp_path / "a.jsonl", HEAD).__exit__()
    changed = replace(HEAD, data={"owner/POPE": "data 9"})
    found = read_answers(tmp_path, "--answers").head
    assert found is not None
    check_data(found, {"owner/MME": "new"}, tmp_path)
    with pytest.raises(DataError, match="its answers are to other files than those in owner/POPE"):
        check_head(found, changed, tmp_path)
    ShardFile(tmp_path / "b.jsonl", changed).__exit__()
    with pytest.raises(DataError, match="another version of the data in owner/POPE"):
        read_answers(tmp_path, "--answers")


def test_a_full_disk_leaves_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(2)
    with ShardFile(tmp_path / "a.jsonl", HEAD) as file:
        file.append([(asked[0], Answered("Yes"))])
        monkeypatch.setattr(
            "os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(OSError, match="No space left"):
            file.append([(asked[1], Answered("No"))])
    assert asked[0].key in read_answers(tmp_path, "--answers").found
    assert all(json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines())
