"""Rules of the preparers of instruction data changed, one at a time: the test of the rows has to notice each change."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from tests.curation.preparing import test_ai2d, test_llava, test_short_questions, test_synthdog_and_text
from tests.curation.preparing.test_ai2d import (
    test_labels_that_cannot_be_read_or_drawn_are_not_taken as labels,
)
from tests.curation.preparing.test_ai2d import (
    test_questions_become_rows_and_those_that_cannot_be_used_are_counted as questions,
)

PACKAGE = "megatron_eve.curation.preparing"
_FIRST = "from __future__ import annotations\n"


class Rows(NamedTuple):
    """A test of rows, and the module and the names that it takes the preparer from."""

    module: str
    names: tuple[str, ...]
    there: ModuleType
    test: Callable[[Path], None]


class Mutation(NamedTuple):
    """A rule changed: the module, a text that its source has once, and what stands there instead."""

    module: str
    old: str
    new: str
    noticed_by: Rows


_captions, _mix = test_llava.TestLlava558k(), test_llava.TestLlavaMix665k()
AI2D = Rows("ai2d", ("Ai2d",), test_ai2d, questions)
LABELS = Rows("choice_labels", ("read_labels", "draw_labels"), test_ai2d, lambda _: labels())
DVQA = Rows(
    "dvqa",
    ("Dvqa",),
    test_short_questions,
    test_short_questions.TestDvqa().test_questions_of_a_picture_are_turns_of_one_conversation,
)
CHARTS = Rows(
    "chartqa",
    ("ChartQa",),
    test_short_questions,
    test_short_questions.TestChartQa().test_json_files_of_people_and_of_the_generator,
)
TABLE = CHARTS._replace(
    test=lambda path: test_short_questions.TestChartQa().test_parquet_with_the_picture_in_each_row(path, 1)
)
PAGES = Rows(
    "docvqa",
    ("DocVqa",),
    test_short_questions,
    test_short_questions.TestDocVqa().test_the_first_answer_of_each_question_of_a_page,
)
MIX = Rows("llava", ("LlavaMix665k",), test_llava, _mix.test_rows_with_the_data_set_that_their_picture_is_of)
CAPTIONS = Rows(
    "llava",
    ("Llava558k",),
    test_llava,
    lambda path: _captions.test_pictures_of_the_archive_and_urls_beside_the_right_row(path, 1),
)
SYNTHDOG = Rows(
    "synthdog",
    ("SynthDog",),
    test_synthdog_and_text,
    test_synthdog_and_text.TestSynthDog().test_parquet_of_the_hub,
)
TEXT = Rows(
    "text", ("Text",), test_synthdog_and_text, test_synthdog_and_text.TestText().test_rows_of_all_layouts
)

MUTATIONS = (
    Mutation("ai2d", "LETTERS[right]", "LETTERS[right - 1]", AI2D),
    Mutation("ai2d", "0 <= right < len(texts)", "0 <= right <= len(texts)", AI2D),
    Mutation("ai2d", "text != _NO_CHOICE and ", "", AI2D),
    Mutation("ai2d", ".stem in self._test_ids", ".name in self._test_ids", AI2D),
    Mutation("ai2d", "_is_label(one) and one.upper() not in", "one.upper() not in", AI2D),
    Mutation("ai2d", 'fields.get("abcLabel") is True', "False", AI2D),
    Mutation("ai2d", "{options(choices)}", "{options(choices[::-1])}", AI2D),
    Mutation("choice_labels", "label.top < label.bottom", "label.top <= label.bottom", LABELS),
    Mutation("choice_labels", "min(y1, y2)", "y1", LABELS),
    Mutation("short_questions", "strip() + SHORT_ANSWER", "strip()", DVQA),
    Mutation("short_questions", "asked if turns else ", "", DVQA),
    Mutation("short_questions", "if key in pictures:", "if False:", DVQA),
    Mutation("short_questions", ".get(name) for question in", ".get(name) for _ in", DVQA),
    Mutation("dvqa", 'text_of(fields, "answer")', 'text_of(fields, "question")', DVQA),
    Mutation("docvqa", "answers[0], meta", "answers[-1], meta", PAGES),
    Mutation("docvqa", "is_eval_split(split)", "False", PAGES),
    Mutation("chartqa", '"human" if', '"augmented" if', CHARTS),
    Mutation("chartqa", '"augmented" in file.name)', '"human" in file.name)', CHARTS),
    Mutation(
        "chartqa",
        'picture = (name, fields["place"])',
        'picture = (name, fields["place"]._replace(row=0))',
        TABLE,
    ),
    Mutation("llava", "is_eval_split(str(name.parent))", "is_eval_split(name.name)", MIX),
    Mutation("llava", 'turn.text == ""', "False", MIX),
    Mutation("llava", "name.parts[0]", "name.parts[1]", MIX),
    Mutation("llava", "urls.get(image) if", "next(iter(urls.values()), None) if", CAPTIONS),
    Mutation("synthdog", "if is_blank(answer)", "if False", SYNTHDOG),
    Mutation("text", "is_eval_split(split)", "False", TEXT),
    Mutation("text", "if record.images or", "if", TEXT),
)


def changed(module: str, old: str = _FIRST, new: str = _FIRST) -> ModuleType:
    """A copy of a module with one piece of its source replaced."""
    real = importlib.import_module(f"{PACKAGE}.{module}")
    source = Path(str(real.__file__)).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{source.count(old)} times {old!r}"
    copy = ModuleType(real.__name__)
    exec(compile(source.replace(old, new), f"changed {module}.py", "exec"), copy.__dict__)
    return copy


def run_changed(one: Mutation, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The test of the rows, with the changed module in the place of the real one."""
    copy = changed(one.module, one.old, one.new)
    rows = one.noticed_by
    if one.module != rows.module:
        monkeypatch.setitem(sys.modules, copy.__name__, copy)
        copy = changed(rows.module)
    for name in rows.names:
        monkeypatch.setattr(rows.there, name, getattr(copy, name))
    rows.test(folder)


@pytest.mark.parametrize("one", MUTATIONS, ids=lambda one: f"{one.module}: {one.new}")
def test_a_changed_rule_is_noticed(one: Mutation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, KeyError, IndexError)):
        run_changed(one, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "one", [*{each.noticed_by: each for each in MUTATIONS}.values()], ids=lambda one: one.module
)
def test_an_unchanged_copy_passes(one: Mutation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_changed(one._replace(old=_FIRST, new=_FIRST), monkeypatch, tmp_path)
