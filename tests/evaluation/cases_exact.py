"""Cases of multiple choice and exact match, and the changes of the rules that they have to notice."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from tests.evaluation.case import Case, Mutation, Refused

READ = [
    ("B", 1), ("B. dog", 1), ("The answer is B.", 1), ("b", None), ("B.", None), ("(B)", None), ("B) dog", None),
    ("So. The answer is C. Yes", 2), ("The answer is B", None), ("The answer is B. The answer is C.", None),
    ("E", None), ("The answer is D.", None), ("D. bird", None), ("x. The answer is A.", 0), ("", None),
    ("B ", None), ("the answer is B.", None), ("B. The answer is C.", 1), ("The answer is Blue.", None),
]  # fmt: skip
CASES: list[Case] = [
    Case("exact", f"ScienceQA {text!r} of three", lambda m, t=text: m.science_qa_choice(t, 3), choice)
    for text, choice in READ
]
CASES += [
    Case("exact", f"ScienceQA {text!r} of five", lambda m, t=text: m.science_qa_choice(t, 5), choice)
    for text, choice in (("E", 4), ("E. x", 4), ("F", None), ("The answer is F.", None))
]


def science(m: ModuleType, which: str, *rows: tuple[Any, ...]) -> tuple[Any, ...]:
    found = m.score_science_qa("sqa", [m.ScienceQARow(*row) for row in rows], which)
    return found.value, found.n, tuple((note.what, note.count) for note in found.left_out)


SCIENCE_ROWS = [
    (1, 1, 3, True, "B"),
    (2, 0, 2, True, "B"),
    (3, 0, 2, False, "A. x"),
    (4, 2, 3, True, "The answer is C."),
]
CASES += [
    Case("exact", "ScienceQA all", lambda m: science(m, "all", *SCIENCE_ROWS), (0.75, 4, ())),
    Case(
        "exact",
        "ScienceQA pictures",
        lambda m: science(m, "with picture", *SCIENCE_ROWS),
        (2 / 3, 3, (("questions", 1),)),
    ),
    Case(
        "exact",
        "ScienceQA text",
        lambda m: science(m, "without picture", *SCIENCE_ROWS),
        (1.0, 1, (("questions", 3),)),
    ),
    Case(
        "exact",
        "ScienceQA unread",
        lambda m: science(m, "all", *SCIENCE_ROWS, (5, 0, 2, True, "a"), (6, 0, 2, True, None)),
        (0.5, 6, (("answers", 1), ("answers", 1))),
    ),
    Case(
        "exact",
        "ScienceQA label",
        lambda m: science(m, "all", *SCIENCE_ROWS, (5, 2, 2, True, "A")),
        Refused("^sqa, question 5: the label is 2; .* 2 choices"),
    ),
    Case(
        "exact",
        "ScienceQA label below 0",
        lambda m: science(m, "all", (5, -1, 2, True, "A")),
        Refused("is -1;"),
    ),
    Case(
        "exact",
        "ScienceQA label no index",
        lambda m: science(m, "all", (5, "A", 2, True, "A")),
        Refused("'A';"),
    ),
    Case(
        "exact",
        "ScienceQA six choices",
        lambda m: science(m, "all", (5, 2, 6, True, "A")),
        Refused("^sqa, question 5: has 6 choices"),
    ),
    Case(
        "exact",
        "ScienceQA none",
        lambda m: science(m, "with picture", SCIENCE_ROWS[2]),
        Refused("^sqa: there are no "),
    ),
]


def match(m: ModuleType, scorer: str, *rows: tuple[Any, Any, Any], **options: bool) -> tuple[Any, ...]:
    found = getattr(m, scorer)("task", [m.MatchRow(*row) for row in rows], **options)
    return found.value, tuple((note.what, note.count) for note in found.left_out)


SINGLE = [
    ("score_seed", "A", "A", 1.0), ("score_seed", "A", "A.", 0.0), ("score_seed", "A", "A. cat", 0.0),
    ("score_seed", "A", "a", 0.0), ("score_seed", "A", "B", 0.0), ("score_seed", "A", "", 0.0),
    ("score_gqa", "yes", "Yes.", 1.0), ("score_gqa", "dog", "the dog", 0.0), ("score_gqa", "yes", "yes!", 0.0),
    ("score_gqa", "yes", "YES...", 1.0), ("score_gqa", "yes", ".yes", 0.0), ("score_gqa", "yes", "yes ", 0.0),
    ("score_gqa", "u.s", "U.S.", 1.0),
]  # fmt: skip
CASES += [
    Case("exact", f"{scorer} {answer!r} for {label}",
         lambda m, s=scorer, a=answer, w=label: match(m, s, (1, w, a))[0], points)
    for scorer, label, answer, points in SINGLE
]  # fmt: skip
CASES += [
    Case(
        "exact",
        "SEED first character",
        lambda m: match(m, "score_seed", (1, "A", "A. cat"), (2, "B", "b"), first_character=True)[0],
        0.5,
    ),
    Case(
        "exact",
        "SEED without an answer",
        lambda m: match(m, "score_seed", (1, "A", "A"), (2, "B", None)),
        (0.5, (("answers", 1),)),
    ),
    Case(
        "exact",
        "SEED label",
        lambda m: match(m, "score_seed", (1, "A", "A"), (8, "E", "E")),
        Refused("^task, question 8: the label is 'E'; "),
    ),
    Case(
        "exact",
        "SEED two letters",
        lambda m: match(m, "score_seed", (8, "AB", "AB")),
        Refused("is 'AB'; "),
    ),
    Case(
        "exact",
        "GQA label",
        lambda m: match(m, "score_gqa", (8, "", "yes")),
        Refused("question 8: .* ''; "),
    ),
    Case(
        "exact",
        "GQA no label",
        lambda m: match(m, "score_gqa", (8, None, "yes")),
        Refused("question 8: .*None"),
    ),
    Case("exact", "GQA none", lambda m: match(m, "score_gqa"), Refused("^task: there are no questions")),
    Case("exact", "MMLU largest", lambda m: m.mmlu_choice([-3.0, -1.5, -2.0, -9.0]), 1),
    Case("exact", "MMLU first of equal ones", lambda m: m.mmlu_choice([-3.0, -1.5, -1.5, -9.0]), 1),
]
CHAINS = [
    ("So the answer is False.", "False"), ("The answer is False.", None), ("so the answer is (B). Yes", "(B). Ye"),
    ("the answer is False", "Fals"), ("the answer is 24.\nQ: next", "24"), ("nothing", None),
]  # fmt: skip
CASES += [Case("exact", f"BBH {text!r}", lambda m, t=text: m.bbh_answer(t), out) for text, out in CHAINS]

# Of videos: answer, label, points.
WORDS = [
    ("guitar", "guitar", 1.0), (" Guitar. ", "guitar", 1.0), ("guitar", "Guitar", 1.0), ("guitar", " guitar", 1.0),
    ("a guitar", "guitar", 0.0), ("guitars", "guitar", 0.0), ("", "guitar", 0.0), (None, "guitar", 0.0),
    ("guitar!", "guitar", 0.0),
]  # fmt: skip
CASES += [
    Case(
        "exact",
        f"video {answer!r}, {label!r}",
        lambda m, a=answer, w=label: m.score_word("x", [m.MatchRow(1, w, a)]).points,
        (points,),
    )
    for answer, label, points in WORDS
]
CASES += [
    Case(
        "exact",
        f"video: the label {label!r}",
        lambda m, w=label: m.score_word("x", [m.MatchRow(1, w, "a")]),
        Refused(f"^x, question 1: the label is {label!r}; write the answer as text"),
    )
    for label in (" ", 3)
]


MUTATIONS = [
    Mutation(
        "exact", "video: spaces of the answer count", "gqa_answer(answer.strip())", "gqa_answer(answer)"
    ),
    Mutation(
        "exact", "video: spaces of the label count", "gqa_answer(row.label.strip())", "gqa_answer(row.label)"
    ),
    Mutation(
        "exact",
        "video: case of the label counts",
        "label=gqa_answer(row.label.strip())",
        "label=row.label.strip()",
    ),
    Mutation(
        "exact",
        "video: the last word counts",
        "gqa_answer(answer.strip())",
        "gqa_answer((answer.split() or [''])[-1])",
    ),
    Mutation(
        "exact", "video: empty labels pass", "isinstance(row.label, str) and row.label.strip()", "row.label"
    ),
    Mutation(
        "exact",
        "ScienceQA: case does not count",
        "named = [answer[0]]\n",
        "named = [answer[0]]\n    elif len(answer) == 1:\n        named = [answer.upper()]\n",
    ),
    Mutation(
        "exact", "ScienceQA: a letter with a full stop counts", 'answer[1:3] == ". ")', 'answer[1:2] == ".")'
    ),
    Mutation(
        "exact", "ScienceQA: the first letter counts", 'and (len(answer) == 1 or answer[1:3] == ". ")', ""
    ),
    Mutation(
        "exact",
        "ScienceQA: a letter alone does not count",
        '(len(answer) == 1 or answer[1:3] == ". ")',
        '(answer[1:3] == ". ")',
    ),
    Mutation(
        "exact",
        "ScienceQA: a letter in front does not count",
        '(len(answer) == 1 or answer[1:3] == ". ")',
        "(len(answer) == 1)",
    ),
    Mutation("exact", "ScienceQA: the sentence needs no full stop", r'([A-Z])\."', r'([A-Z])"'),
    Mutation("exact", "ScienceQA: the sentence ends in anything", r'([A-Z])\."', r'([A-Z])."'),
    Mutation(
        "exact", "ScienceQA: the sentence stands at the beginning", 'r"The answer is', 'r"^The answer is'
    ),
    Mutation(
        "exact",
        "ScienceQA: the first of several sentences",
        "if len(named) == 1 and named[0]",
        "if named and named[0]",
    ),
    Mutation(
        "exact",
        "ScienceQA: letters beyond the choices",
        "_SCIENCE_QA_LETTERS[:choices]",
        "_SCIENCE_QA_LETTERS",
    ),
    Mutation("exact", "ScienceQA: letters beyond E", "LETTERS[:5]", "LETTERS[:6]"),
    Mutation("exact", "ScienceQA: four letters", "LETTERS[:5]", "LETTERS[:4]"),
    Mutation("exact", "ScienceQA: always all questions", 'if questions == "all" or', "if True or"),
    Mutation(
        "exact",
        "ScienceQA: the other questions",
        '== (questions == "with picture")',
        '!= (questions == "with picture")',
    ),
    Mutation(
        "exact",
        "ScienceQA: labels count from 1",
        "float(choice == row.label)",
        "float(choice is not None and choice + 1 == row.label)",
    ),
    Mutation("exact", "ScienceQA: labels outside the choices pass", "0 <= row.label < most", "True"),
    Mutation("exact", "ScienceQA: negative labels pass", "0 <= row.label < most", "row.label < most"),
    Mutation("exact", "ScienceQA: six choices pass", "row.choices > most", "False"),
    Mutation(
        "exact",
        "SEED: the first character counts",
        "if first_character else answer",
        "if True else answer",
    ),
    Mutation(
        "exact",
        "SEED: the option is not heard",
        "if first_character else answer",
        "if False else answer",
    ),
    Mutation(
        "exact",
        "SEED: case does not count",
        "first_character else answer",
        "first_character else answer.upper()",
    ),
    Mutation(
        "exact",
        "SEED: full stops do not count",
        "first_character else answer",
        'first_character else answer.rstrip(".")',
    ),
    Mutation("exact", "SEED: any label passes", "row.label not in tuple(LETTERS[:4])", "False"),
    Mutation(
        "exact",
        "SEED: E is a label",
        "row.label not in tuple(LETTERS[:4])",
        "row.label not in tuple(LETTERS[:5])",
    ),
    Mutation("exact", "SEED: parts of ABCD are labels", "tuple(LETTERS[:4])", "LETTERS[:4]"),
    Mutation("exact", "GQA: full stops stay", 'answer.rstrip(".").lower()', "answer.lower()"),
    Mutation("exact", "GQA: one full stop is dropped", 'answer.rstrip(".")', 'answer.removesuffix(".")'),
    Mutation("exact", "GQA: full stops in front are dropped", 'answer.rstrip(".")', 'answer.strip(".")'),
    Mutation("exact", "GQA: every full stop is dropped", 'answer.rstrip(".")', 'answer.replace(".", "")'),
    Mutation("exact", "GQA: other marks are dropped", 'rstrip(".")', 'rstrip(".!")'),
    Mutation("exact", "GQA: spaces are dropped", 'rstrip(".")', 'rstrip(". ")'),
    Mutation("exact", "GQA: case counts", 'rstrip(".").lower()', 'rstrip(".")'),
    Mutation(
        "exact",
        "GQA: the label may stand anywhere",
        "read(row.answer) == row.label",
        "row.label in read(row.answer)",
    ),
    Mutation("exact", "GQA: any label passes", "not isinstance(row.label, str) or not row.label", "False"),
    Mutation("exact", "no answer is right", "row.answer is not None and read", "row.answer is None or read"),
    Mutation("exact", "MMLU: the smallest", "return max(range", "return min(range"),
    Mutation("exact", "BBH: the last character stays", "(.*)(?=.)", "(.*)"),
    Mutation("exact", "BBH: case does not count", '(?=.)")', '(?=.)", re.IGNORECASE)'),
    Mutation("exact", "BBH: up to the first full stop", "(.*)(?=.)", r"(.*?)(?=\.)"),
]
