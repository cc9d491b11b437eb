"""The table of scores: values, published ones beside them, and notes."""

from __future__ import annotations

from megatron_eve.evaluation.measured import Measured
from megatron_eve.evaluation.report import markdown


def test_published_values_stand_beside_ours() -> None:
    table = markdown(
        [
            Measured(
                "a_mme", "perception", 1200.25, None, 2374, "A", True, (), {"A-7B": 1217.3, "B-8B": 728.6}
            ),
            Measured("a_mme", "cognition", 250.0, None, 2374, "A", False),
            Measured(
                "a_gqa",
                "accuracy",
                60.123456,
                0.45678,
                12578,
                "A",
                True,
                ("1 answers: none",),
                {"A-7B": 60.8},
            ),
            Measured("a_vqa", "submission", None, None, 10, "A", True),
        ],
        {"a_gqa": {"image_unreadable": 1, "prompt_too_long": 2}},
    )
    assert table.splitlines() == [
        "| task  | metric         | value   | standard error | n      | protocol | A-7B    | B-8B  |",
        "|-------|----------------|---------|----------------|--------|----------|---------|-------|",
        "| a_mme | **perception** | 1,200.2 |                | 2,374  | A        | 1,217.3 | 728.6 |",
        "| a_mme | cognition      | 250     |                | 2,374  | A        |         |       |",
        "| a_gqa | **accuracy**   | 60.123  | 0.46           | 12,578 | A        | 60.8    |       |",
        "| a_vqa | **submission** | -       |                | 10     | A        |         |       |",
        "",
        "- values of other models are those of their papers, not measured here",
        "- a_gqa: 1 answers: none",
        "- a_gqa: 3 requests without an answer, scored as wrong (image_unreadable 1, prompt_too_long 2)",
    ]


def test_without_published_values_there_are_no_columns() -> None:
    table = markdown([Measured("pope", "accuracy", 0.5, None, 4, "lmms-eval", True)], {})
    assert table.splitlines()[0].endswith("| protocol  |") and len(table.splitlines()) == 3


def test_values_of_a_judge_have_notes_of_their_own_and_no_published_value_beside_them() -> None:
    lines = markdown(
        [
            Measured("a_vet", "submission", None, None, 2, "A", True, (), {"A-7B": 30.5}),
            Measured(
                "a_vet",
                "judged by a|b\nc",
                50.0,
                None,
                2,
                "P, judge a|b\nc",
                False,
                ("judged: 1",),
                judge="a|b\nc",
            ),
        ],
        {},
    ).splitlines()
    assert lines[3].replace(" ", "") == r"|a_vet|judgedbya\|bc|50||2|P,judgea\|bc||"
    assert lines[-1] == "- a_vet: judged: 1" and len(lines) == 7
