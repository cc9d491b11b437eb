"""The scorers of benchmarks on cases worked out by hand or with the published code."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.scorers.answer_processor import CONTRACTIONS
from megatron_eve.evaluation.scorers.scores import LeftOut, Score, bad_label
from megatron_eve.evaluation.scorers.vqa import vqa_accuracy
from tests.evaluation.case import SCORERS, Case, agrees, outcome
from tests.evaluation.cases import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.module}: {case.name}")
def test_case(case: Case) -> None:
    found = outcome(case, importlib.import_module(f"{SCORERS}.{case.module}"))
    assert agrees(case, found), f"{found!r} instead of {case.expected!r}"


def test_no_case_is_there_twice() -> None:
    assert len({(case.module, case.name) for case in CASES}) == len(CASES)


def test_the_table_of_contractions_has_what_the_published_one_has() -> None:
    # 120 entries are published: four begin with a capital I, which no text in lower case meets, two change nothing.
    assert len(CONTRACTIONS) == 114
    assert all(short == short.lower() and short != word for short, word in CONTRACTIONS.items())
    assert {word: CONTRACTIONS.get(word) for word in ("hed", "shed", "were", "ill", "theres", "whereve")} == {
        "hed": "he'd", "shed": None, "were": None, "ill": None, "theres": "there's", "whereve": "where've",
    }  # fmt: skip


def test_a_single_answer_needs_ten_people() -> None:
    with pytest.raises(ValueError, match="9 answers of people instead of 10"):
        vqa_accuracy("yes", ["yes"] * 9)


def test_a_score_says_how_many_and_what_was_left_out() -> None:
    score = Score((1.0, 0.0, 0.5, 0.5), (LeftOut("answers", 1, "the model gave none"),))
    assert (score.value, score.n, score.left_out[0].count) == (0.5, 4, 1)


def test_a_long_label_is_cut_and_stays_on_one_line() -> None:
    message = str(bad_label("pope", 7, "a\nb" * 10_000, "write yes or no"))
    assert (
        len(message) < 200 and "\n" not in message and message.startswith("pope, question 7: the label is ")
    )
    assert isinstance(bad_label("pope", 7, None, ""), DataError)


@pytest.mark.parametrize("text", ["\x00", "\ud800", "é" * 100_000, "'" * 10_000, "." * 10_000, "a\u2028b"])
def test_any_text_can_be_scored(text: str) -> None:
    answers = {case.module for case in CASES}
    modules = {name: importlib.import_module(f"{SCORERS}.{name}") for name in answers}
    assert 0 <= vqa_accuracy(text, [text] * 10) <= 1
    assert modules["pope"].says_yes(text) and modules["mme"].read_answer(text) is None
    assert modules["exact"].science_qa_choice(text, 4) is None and modules["exact"].bbh_answer(text) is None
    assert modules["circular"].option_of(text, {"A": "cat", "B": "dog"}) is None


def test_scorers_need_neither_torch_nor_a_harness() -> None:
    names = sorted({case.module for case in CASES})
    code = f"import sys\nfor name in {names}:\n    __import__('{SCORERS}.' + name)\n"
    code += "print(sorted({'torch', 'numpy', 'lmms_eval', 'lm_eval', 'datasets'} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
