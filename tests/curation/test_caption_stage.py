"""The stage `caption`: its table, kills in the middle of a shard, refusals, and new captions in the build."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.config import ConfigError
from megatron_eve.curation.caption_answers import CaptionAnswer
from megatron_eve.curation.caption_page import caption_page, shown_captions
from megatron_eve.curation.caption_prompts import drawn_prompt
from megatron_eve.curation.reasons import find_reason
from megatron_eve.curation.stage import Stage
from megatron_eve.curation.stage_record import begin_stage
from megatron_eve.curation.stages import caption
from megatron_eve.curation.stages.build import BuildStage
from megatron_eve.curation.stages.caption import PUBLISHED_RULES, CaptionStage, table_row
from megatron_eve.curation.text_rules import CaptionRules
from megatron_eve.curation.work import Work
from megatron_eve.data.errors import DataError
from megatron_eve.data.schema import Record
from megatron_eve.inference.transformers_engine import TransformersEngine
from tests.curation.caption_toy import DAMAGED, PROMPTS, TALK, TEXT, toy_work
from tests.curation.test_captioner import alone
from tests.inference.baseline_models import make_llava
from tests.inference.openai_server import serving

ROOT = Path(__file__).resolve().parents[2]
NO_RULES = ["--max-repeated", "1", "--no-complete-sentences"]  # a random model writes no sentences
KEEP_ALL = CaptionRules()


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("caption_stage"))


@pytest.fixture(scope="module")
def engine(llava: Path) -> TransformersEngine:
    return TransformersEngine(llava)


def stage_of(work: Work, *words: str) -> CaptionStage:
    """The stage of a command line, with the prompts beside the work folder."""
    parser = argparse.ArgumentParser()
    caption.add_flags(parser)
    fixed = ["--prompt-file", str(work.folder.parent / "prompts.txt"), "--max-new-tokens", "8", "--seed", "5"]
    return caption.from_flags(parser.parse_args([*fixed, *NO_RULES, *words]))


def tables(work: Work) -> list[list[dict[str, Any]]]:
    return [work.read_table("caption", shard).to_pylist() for shard in range(len(work.inputs))]


def run_shard(stage: Stage, folder: Path, shard: int) -> None:
    """For a process of its own."""
    stage.run(Work.open(folder), shard)


def without_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stages be run whose shards have not been filtered: all rows are kept."""
    monkeypatch.setattr(CaptionStage, "needs", ())
    monkeypatch.setattr(BuildStage, "needs", ())


def test_captions_of_a_shard_killed_twice_are_those_of_one_run_and_of_each_picture_alone(
    llava: Path, engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_filter(monkeypatch)
    work = toy_work(tmp_path, shards=3, rows=8)
    stage = stage_of(work, "--model-path", str(llava), "--batch-size", "2")
    begin_stage(stage, work)
    answers = work.table("caption", 1, ".answers.jsonl")
    for lines in (2, 5):
        process = multiprocessing.get_context("fork").Process(target=run_shard, args=(stage, work.folder, 1))
        process.start()
        deadline = time.monotonic() + 120
        while process.is_alive() and not (answers.exists() and answers.read_bytes().count(b"\n") >= lines):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL and not work.table("caption", 1).exists()
        assert lines <= answers.read_bytes().count(b"\n") < 8
    counts = sum((stage.run(work, shard) for shard in range(3)), Counter())
    assert counts == {caption.NEW: 21, caption.UNCHANGED: 2, "image_damaged": 1}

    whole = toy_work(tmp_path / "again", shards=3, rows=8)
    once = stage_of(whole, "--model-path", str(llava), "--batch-size", "2")
    begin_stage(once, whole)
    for shard in range(3):
        once.run(whole, shard)
        files = [one.table("caption", shard, ".answers.jsonl").read_bytes() for one in (work, whole)]
        assert files[0] == files[1]
    assert tables(work) == tables(whole)

    for shard in (1, 2):
        records = dict(work.records(shard))
        rows = tables(work)[shard]
        assert [row["row"] for row in rows] == list(range(8))
        for number, row in enumerate(rows):
            record = records[number]
            assert isinstance(record, Record)
            if (shard, number) in (TALK, TEXT):
                assert (row["caption"], row["reason"]) == (None, None)
            elif (shard, number) == DAMAGED:
                assert (row["caption"], row["reason"]) == (None, "image_damaged")
            else:
                prompt = drawn_prompt(PROMPTS, 5, shard * 8 + number)
                wanted = alone(engine, caption.picture_of(number, prompt, record)).caption
                assert (row["caption"], row["reason"]) == (wanted, None)


def test_the_build_has_the_new_captions_and_keeps_the_old_ones(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_filter(monkeypatch)
    work = toy_work(tmp_path, shards=3, rows=8)
    stage = stage_of(work, "--model-path", str(llava))
    begin_stage(stage, work)
    work.stage_folder("build").mkdir()
    for shard in range(3):
        stage.run(work, shard)
        BuildStage().run(work, shard)
    for shard in range(3):
        built = Work(work.folder, type(work.inputs).of([str(work.table("build", shard))]))
        records = {record.id: record for _, record in built.records(0)}
        for row in tables(work)[shard]:
            old = dict(work.records(shard))[row["row"]]
            assert isinstance(old, Record)
            if (shard, row["row"]) == DAMAGED:
                assert old.id not in records
                continue
            new = records[old.id]
            assert isinstance(new, Record) and new.images == old.images
            if (shard, row["row"]) in (TALK, TEXT):
                assert new == old
                continue
            assert new.turns == [{"from": "gpt", "value": f"<image>{row['caption']}"}]
            before = {"original_caption": f"old caption {old.id.removeprefix('id')}"} if old.id else {}
            had_one = old.turns[0]["value"] != "<image>"
            assert new.meta == {**old.meta, **(before if had_one else {})}


@pytest.mark.parametrize(
    ("text", "rules", "reason"),
    [
        ("A cat sits on a mat.", PUBLISHED_RULES, None),
        ("A cat sits on", PUBLISHED_RULES, "caption_without_end"),
        ("A cat on a cat on a cat on a cat on a mat.", PUBLISHED_RULES, "caption_repetitive"),
        ("A cat.", CaptionRules(min_words=3), "caption_too_short"),
        ("A cat sits on", KEEP_ALL, None),
        ("", KEEP_ALL, "caption_empty"),
        (" \u200b\n", KEEP_ALL, "caption_empty"),
        ("half \ud83d", KEEP_ALL, "text_not_unicode"),
    ],
)
def test_new_captions_are_kept_or_dropped_by_the_rules(
    text: str, rules: CaptionRules, reason: str | None
) -> None:
    row = table_row(CaptionAnswer(4, "What?", text), rules)
    assert (row["row"], row["reason"]) == (4, reason)
    if reason is None:
        assert row["caption"] == text
    else:
        assert row["detail"] and find_reason(reason).what


def test_a_caption_holds_no_place_of_a_picture() -> None:
    assert table_row(CaptionAnswer(0, "What?", "An <image>."), KEEP_ALL)["caption"] == "An <IMAGE>."


@pytest.mark.parametrize(
    "reason", ["server_error", "prompt_too_long", "picture_not_in_shard", "caption_empty"]
)
def test_reasons_are_explained(reason: str) -> None:
    assert find_reason(reason).what and find_reason(reason).remedy


def test_another_model_prompt_or_limit_is_refused(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_filter(monkeypatch)
    work = toy_work(tmp_path / "toy", shards=1, rows=2)
    other = make_llava(tmp_path / "other", seed=1)
    begin_stage(stage_of(work, "--model-path", str(llava)), work)
    begin_stage(stage_of(work, "--model-path", str(llava), "--batch-size", "3"), work)  # decides nothing
    for words, said in (
        (["--model-path", str(other)], "was begun with model_sha256"),
        (["--model-path", str(llava), "--seed", "6"], "was begun with seed = 5, and this command has 6"),
        (["--model-path", str(llava), "--max-new-tokens", "9"], "was begun with max_new_tokens = 8"),
        (["--model-path", str(llava), "--min-words", "3"], "was begun with min_words = null"),
        (["--model-path", str(llava), "--temperature", "1"], "was begun with sampling = null"),
    ):
        with pytest.raises(DataError, match=re.escape(said)):
            begin_stage(stage_of(work, *words), work)
    (work.folder.parent / "prompts.txt").write_text("Another.\n", encoding="utf-8")
    with pytest.raises(DataError, match="was begun with prompts = "):
        begin_stage(stage_of(work, "--model-path", str(llava)), work)


def test_a_server_is_known_by_the_name_of_its_model_not_by_its_address(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_filter(monkeypatch)
    work = toy_work(tmp_path, shards=2, rows=6)
    with serving(engine) as (url, _):
        stage = stage_of(work, "--base-url", url, "--model", "tiny")
        begin_stage(stage, work)
        assert stage.run(work, 0) == {caption.NEW: 6}
    with serving(engine) as (url, _):
        again = stage_of(work, "--base-url", url, "--model", "tiny")
        begin_stage(again, work)
        assert again.run(work, 1) == {caption.NEW: 5, "image_damaged": 1}
    settings = json.loads((work.stage_folder("caption") / "stage.json").read_text(encoding="utf-8"))[
        "settings"
    ]
    assert settings["served_model"] == "tiny" and url not in json.dumps(settings)
    for row in tables(work)[0]:
        record = dict(work.records(0))[row["row"]]
        prompt = drawn_prompt(PROMPTS, 5, row["row"])
        assert row["caption"] == alone(engine, caption.picture_of(row["row"], prompt, record)).caption


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name one model: --model-path DIR, or --base-url URL with --model NAME"),
        (["--base-url", "http://127.0.0.1:9/v1"], "--base-url: name the model"),
        (["--model-path", "MODEL", "--model", "tiny"], "--model: is the name of a server's model"),
        (["--model-path", "EMPTY"], "no folder that transformers loads (it has no config.json)"),
        (
            ["--base-url", "http://127.0.0.1:9/v1", "--model", "tiny", "--temperature", "1"],
            "--temperature: a server is asked for the most likely caption alone",
        ),
        (["--model-path", "MODEL", "--top-k", "5"], "--top-k: has no effect without --temperature above 0"),
        (
            ["--model-path", "MODEL", "--prompt-file", "nowhere.txt"],
            "--prompt-file nowhere.txt: no such file",
        ),
    ],
)
def test_flags_that_cannot_be(llava: Path, tmp_path: Path, words: list[str], said: str) -> None:
    work = toy_work(tmp_path / "toy", shards=1, rows=1)
    (tmp_path / "empty").mkdir()
    places = {"MODEL": str(llava), "EMPTY": str(tmp_path / "empty")}
    with pytest.raises((ConfigError, DataError), match=re.escape(said)):
        stage_of(work, *(places.get(word, word) for word in words))


def test_the_page_shows_old_and_new_captions_and_dropped_ones(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_filter(monkeypatch)
    work = toy_work(tmp_path, shards=2, rows=8)
    stage = stage_of(work, "--model-path", str(llava))
    begin_stage(stage, work)
    for shard in range(2):
        stage.run(work, shard)
    shown = shown_captions(work, "caption", lambda shard, row: f"prompt of <{shard}> {row}")
    page = caption_page("toy", [("new captions", "15")], shown)
    assert len(shown) == 16 and page.count("<img ") == 15
    assert "<h2>Dropped: image_damaged</h2>" in page and "prompt of &lt;1&gt; 3" in page
    assert (
        "old caption 3" in page and ">none<" not in page.split("Dropped")[0].replace("\nnone<", ">none<")[:0]
    )
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 900
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def rank_of(command: subprocess.Popen[bytes]) -> int:
    """The process that a command has started for a shard."""
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text(encoding="ascii").split()
    (rank,) = (int(one) for one in children if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes())
    return rank


@pytest.mark.slow
def test_the_command_is_killed_twice_and_ends_as_one_run(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 pictures in 4 shards: a rank is killed in the middle of a shard, then the command itself."""
    command = [sys.executable, str(ROOT / "tools" / "curate.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def words(work: Work) -> list[str]:
        asked = ["--model-path", str(llava), "--prompt-file", str(work.folder.parent / "prompts.txt")]
        fixed = [*asked, *NO_RULES, "--max-new-tokens", "8", "--seed", "5", "--batch-size", "1"]
        return [*command, "caption", "--work", str(work.folder), *fixed]

    killed, whole = toy_work(tmp_path / "killed"), toy_work(tmp_path / "whole")
    filtered = [*command, "filter", "--work", str(killed.folder), "--min-side", "1"]
    subprocess.run(filtered, env=environment, check=True, capture_output=True)
    without_filter(monkeypatch)
    stage = stage_of(whole, "--model-path", str(llava))
    begin_stage(stage, whole)
    for shard in range(4):
        stage.run(whole, shard)

    def lines(shard: int) -> int:
        path = killed.table("caption", shard, ".answers.jsonl")
        return path.read_bytes().count(b"\n") if path.exists() else 0

    with subprocess.Popen(words(killed), env=environment, stdout=subprocess.DEVNULL) as first:
        try:
            wait_for(lambda: lines(0) >= 2, first)
            os.kill(rank_of(first), signal.SIGKILL)
            wait_for(lambda: lines(1) >= 2, first)
        finally:
            first.kill()
    assert not any(killed.table("caption", shard).exists() for shard in (0, 1))
    assert 2 <= lines(0) < 16 and 2 <= lines(1) < 16

    done = subprocess.run(words(killed), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"new captions +61\n", done.stdout)
    assert (killed.stage_folder("caption") / "index.html").exists()
    # The damaged picture was dropped by the filter.
    assert tables(killed) == [[row for row in rows if row["reason"] is None] for rows in tables(whole)]
