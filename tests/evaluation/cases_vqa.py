"""Cases of VQA accuracy, and the changes of its rules that they have to notice."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from tests.evaluation.case import Case, Mutation, Refused

DISAGREE = ["yes"] * 7 + ["no"] * 2 + ["maybe"]


def _said_by(count: int) -> list[str]:
    """Ten answers, of which so many are "cat" and the others differ from each other."""
    return ["cat"] * count + [f"w{number}" for number in range(10 - count)]


MADE: list[tuple[str, list[str], str, float]] = []
for rule in ("processed", "converted", "vqa_tool"):
    MADE += [
        ("cat", _said_by(k), rule, (0.0, 0.3, 0.6, 0.9, 1.0)[min(k, 4)]) for k in (0, 1, 2, 3, 4, 5, 9, 10)
    ]
    MADE += [
        (text, DISAGREE, rule, points)
        for text, points in (("yes", 1.0), ("Yes.", 1.0), ("no", 0.6), ("maybe", 0.3), ("zebra", 0.0))
    ]
SAME = ["yes"] * 10
MADE += [("Yes", SAME, "vqa_tool", 0.0), ("Yes", SAME, "converted", 1.0), ("Yes", SAME, "processed", 1.0)]
MADE += [("yes\n", SAME, "vqa_tool", 1.0), ("\tyes", [" yes"] * 10, "vqa_tool", 1.0)]
# ten equal answers that the processor changes: the tool compares with them as they stand
MADE += [("the dog", ["the dog"] * 10, "vqa_tool", 1.0), ("the dog", ["the dog"] * 10, "converted", 0.0)]
MADE += [("the dog", ["The dog."] * 10, "processed", 1.0)]
# where they differ, the tool has no first step: a comma between digits drops all punctuation
NUMBERS = ["1,000-2,000"] * 9 + ["x"]
MADE += [("1,000-2,000", NUMBERS, "vqa_tool", 1.0), ("1,000-2,000", NUMBERS, "converted", 0.0)]
MADE += [("10002000", NUMBERS, "vqa_tool", 1.0), ("1000 2000", NUMBERS, "processed", 1.0)]
CASES: list[Case] = [
    Case(
        "vqa",
        f"{rule} {text!r} against {'|'.join(people)}",
        lambda m, text=text, people=people, rule=rule: m.vqa_accuracy(text, people, rule),
        expected,
    )
    for text, people, rule, expected in MADE
]


def score(m: ModuleType, *rows: tuple[Any, Any, Any]) -> tuple[Any, ...]:
    found = m.score_vqa("textvqa_val", [m.VQARow(*row) for row in rows], "processed")
    return found.value, found.n, found.points, tuple((n.what, n.count) for n in found.left_out)


GOOD = (1, "yes", DISAGREE)
CASES += [
    Case("vqa", "mean", lambda m: score(m, GOOD, (2, "no", DISAGREE)), (0.8, 2, (1.0, 0.6), ())),
    Case(
        "vqa",
        "a question without an answer is wrong and counted",
        lambda m: score(m, GOOD, (2, None, DISAGREE)),
        (0.5, 2, (1.0, 0.0), (("answers", 1),)),
    ),
    Case("vqa", "an empty answer is one", lambda m: score(m, (1, "", ["the"] * 10)), (1.0, 1, (1.0,), ())),
    Case(
        "vqa",
        "nine people",
        lambda m: score(m, GOOD, (34602, "yes", ["yes"] * 9)),
        Refused("^textvqa_val, question 34602: has 9 answers .* instead of 10; "),
    ),
    Case(
        "vqa",
        "eleven people",
        lambda m: score(m, (7, "yes", ["yes"] * 11)),
        Refused("question 7: has 11 "),
    ),
    Case(
        "vqa",
        "an answer of people that is no text",
        lambda m: score(m, (7, "yes", ["yes"] * 9 + [None])),
        Refused("^textvqa_val, question 7: .*None"),
    ),
    Case(
        "vqa",
        "one text in the place of ten",
        lambda m: score(m, (7, "yes", "0123456789")),
        Refused("^textvqa_val, question 7: the label is '0123456789'; "),
    ),
    Case("vqa", "no questions", lambda m: score(m), Refused("^textvqa_val: there are no questions")),
]


MUTATIONS = [
    Mutation("vqa", "nobody is left out", "count - this", "count"),
    Mutation("vqa", "the cap of 1 is removed", "min(1.0, (count - this) / _FULL)", "(count - this) / _FULL"),
    Mutation("vqa", "two others are enough", "_FULL = 3", "_FULL = 2"),
    Mutation("vqa", "all others are needed", "_FULL = 3", "_FULL = 9"),
    Mutation(
        "vqa",
        "any answer of people counts fully",
        "same = [person == answer",
        "same = [bool(people.count(answer))",
    ),
    Mutation(
        "vqa",
        "the most frequent answer alone counts",
        "person == answer for",
        "person == answer == max(people, key=people.count) for",
    ),
    Mutation("vqa", "the model's answer is not processed", "answer = process_answer(answer)\n", "pass\n"),
    Mutation(
        "vqa", "people's answers are not processed", "people = [process_answer(person)", "people = [(person)"
    ),
    Mutation("vqa", "the tool processes the model's answer first", 'if rule != "vqa_tool":', "if True:"),
    Mutation("vqa", "the conversion is left out", 'if rule != "vqa_tool":', 'if rule == "processed":'),
    Mutation("vqa", "the tool processes ten equal answers", "len(set(people)) > 1", "True"),
    Mutation("vqa", "the tool never processes", "len(set(people)) > 1", "False"),
    Mutation(
        "vqa", "the tool has EvalAI's first step", "[process_as_vqa_tool(person)", "[process_answer(person)"
    ),
    Mutation(
        "vqa",
        "line ends count where people agree",
        "one_line(answer), [one_line(person)",
        "answer, [(person)",
    ),
    Mutation(
        "vqa",
        "questions without an answer are left out",
        "points.append(0.0 if row.answer is None else",
        "row.answer is None or points.append(",
    ),
    Mutation("vqa", "nine people are taken", "        _check_people(task, row)\n", ""),
    Mutation("vqa", "one text is taken for ten", "isinstance(row.people, str) or ", ""),
    Mutation(
        "vqa", "people may be anything", "not all(isinstance(person, str) for person in row.people)", "False"
    ),
]
