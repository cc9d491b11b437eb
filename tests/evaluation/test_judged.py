"""What a judge is asked, and the values of its verdicts, each worked out by hand. `cases_judged.py` has its replies."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.scorers.judged import (
    RULES,
    JudgeRow,
    Verdict,
    check_labels,
    judged_values,
)


def test_what_judges_are_asked() -> None:
    row = JudgeRow("v1_0", "What is x?", "-1<AND>-5<OR>@a", "x = @q")
    ((role, text),) = RULES["mmvet"].messages(row)
    assert role == "user" and text.endswith("| 1.0\n\nWhat is x? | -1 <AND> -5 <OR> @a | x = @q |")
    assert text.startswith("Compare the ground truth and prediction from AI models, to give")
    (system, said), (_, text) = RULES["video"].messages(row)
    assert system == "system" and said.startswith("You are an intelligent chatbot")
    assert (
        "\n\nQuestion: What is x?\nCorrect Answer: -1<AND>-5<OR>@a\nPredicted Answer: x = @q\n\nProvide"
        in text
    )
    ((_, text),) = RULES["picture"].messages(JudgeRow(0, "two cats", "", "pictures/x.png", picture=Path("x")))
    assert text == 'Does this figure show "two cats"? Please answer yes or no.'


def test_prompts_are_those_of_lmms_eval() -> None:
    """Its files name an API's address when they are imported, so their text is read."""
    tasks = Path(pytest.importorskip("lmms_eval").__file__).parent / "tasks"
    from megatron_eve.evaluation.scorers import judge_prompts

    assert f'MM_VET_PROMPT = """{judge_prompts.MMVET}"""' in (tasks / "mmvet" / "utils.py").read_text()
    stock = (tasks / "activitynetqa" / "utils.py").read_text()
    for text in (judge_prompts.VIDEO_CHATGPT_SYSTEM, judge_prompts.VIDEO_CHATGPT):
        for sentence in text.replace("@", "\n").split("\n"):
            assert sentence.strip("qla :")[:40] in stock


MMVET = [
    JudgeRow("a", "q", "l", "x", ("ocr", "math")),
    JudgeRow("b", "q", "l", "x", ("math",)),
    JudgeRow("c", "q", "l", None, ("rec",)),
    JudgeRow("d", "q", "l", "x", ("rec", "ocr")),
]


def test_values_of_mm_vet() -> None:
    """0.5, 1 and an answer that does not exist; the fourth reply could not be read and is in no value."""
    found = judged_values(RULES["mmvet"], MMVET, [Verdict(0.5), Verdict(1.0), None, None])
    assert {name: (one.value, one.n) for name, one in found.items()} == {
        "": (50, 3), "rec": (0, 1), "ocr": (50, 1), "math": (75, 2),
    }  # fmt: skip
    assert found[""].standard_error == pytest.approx(100 * 0.5 / 3**0.5)
    assert [(note.count, note.why) for note in found[""].left_out] == [
        (1, "the model gave none: scored as wrong"),
        (1, "no reply of the judge could be read: not in the values of the judge"),
    ]
    assert not found["math"].left_out


def test_no_reply_at_all_is_no_value() -> None:
    found = judged_values(RULES["mmvet"], MMVET[:2], [None, None])
    assert [(one.value, one.n, one.left_out[0].count) for one in found.values()] == [(None, 0, 2)]
    assert judged_values(RULES["video"], MMVET[:1], [None])["score of 5"].value is None
    assert judged_values(RULES["picture"], MMVET[:1], [None])["share of yes"].value is None


def test_values_of_videos() -> None:
    """Yes 4, yes 5, no 1 and no answer: 2 of 4 are right, (4 + 5 + 1 + 0) / 4 = 2.5."""
    rows = [JudgeRow(number, "q", "l", "x" if number < 3 else None) for number in range(4)]
    found = judged_values(RULES["video"], rows, [Verdict(1.0, 4), Verdict(1.0, 5), Verdict(0.0, 1), None])
    assert {name: one.value for name, one in found.items()} == {"accuracy": 50, "score of 5": 2.5}
    assert found["score of 5"].standard_error == pytest.approx((17 / 3) ** 0.5 / 2)


def test_values_of_pictures() -> None:
    """The probability of yes where all replies have it, else the share of yes."""
    groups = [("basic",), ("advanced",), ("advanced",), ()]
    rows = [JudgeRow(number, "p", "", "x.png" if number < 3 else None, groups[number]) for number in range(4)]
    said = [Verdict(1.0, probability=0.8), Verdict(1.0, probability=0.6), Verdict(0.0, probability=0.2), None]
    found = judged_values(RULES["picture"], rows, said)
    assert {name: one.value for name, one in found.items()} == pytest.approx({
        "probability of yes": 40, "probability of yes: basic": 80, "probability of yes: advanced": 40,
    })  # fmt: skip
    found = judged_values(RULES["picture"], rows, [Verdict(1.0), *said[1:]])
    assert {name: one.value for name, one in found.items()} == {
        "share of yes": 50, "share of yes: basic": 100, "share of yes: advanced": 50,
    }  # fmt: skip


def test_labels_that_cannot_be_graded() -> None:
    with pytest.raises(DataError, match="eve_mmvet, question b: the label is ''; a judge needs"):
        check_labels("eve_mmvet", RULES["mmvet"], [MMVET[0], JudgeRow("b", "q", "", "x")])
    check_labels("vila_u_genai_bench", RULES["picture"], [JudgeRow("b", "q", "", "x")])
