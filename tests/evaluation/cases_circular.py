"""Cases of MMBench, circular, and the changes of its rules that they have to notice."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from tests.evaluation.case import Case, Mutation, Refused

TEXTS = ("cat", "dog", "cup", "hat")


def _options(rotation: int) -> dict[str, str]:
    """Options rotated so that the dog is B, C, D, A."""
    return {"ABCD"[(place + rotation) % 4]: text for place, text in enumerate(TEXTS)}


PETS = _options(0)
READ = [
    ("B", "B"), ("B. dog", "B"), ("(C)", "C"), ("D.", "D"), ("dog", "B"), ("A dog is there", "B"), ("", None),
    ("A, a cat", "A"), ("A cat", "A"), ("It is A I think", None), ("It is B I think", "B"), ("b", None),
    ("The DOG runs", "B"), ("cat or dog", None), ("A or B", None), ("B or C: dog", "B"), ("E", None), ("B:", "B"),
    ("BA", None), ("Answer: C, not dog", "C"), ("A dog or a cup", None), ("bird", None), ("[B]", "B"),
    ("A B", None), ("B and a hat", "B"), ("A the dog", "A"),
]  # fmt: skip
CASES: list[Case] = [
    Case("circular", f"read {text!r}", lambda m, t=text: m.option_of(t, PETS), letter)
    for text, letter in READ
]


def rows(*answers: str | None, index: int = 3, category: str = "animals") -> list[tuple[Any, ...]]:
    return [
        (index + r * 1_000_000, category, _options(r), "BCDA"[r], answer) for r, answer in enumerate(answers)
    ]


def score(m: ModuleType, *rows: tuple[Any, ...]) -> Any:
    return m.score_circular("mmbench_en", [m.CircularRow(*row) for row in rows])


SIX = [
    (("B", "C", "D", "A"), 1.0), (("B", "C", "D", "B"), 0.0), (("B. dog", "(C)", "D.", "dog"), 1.0),
    (("B", "C", "D", "A dog is there"), 1.0), (("B", "C", "D", ""), 0.0), (("C", "D", "A", "B"), 0.0),
    (("B", "C", "D", None), 0.0), (("A dog is there", "C", "D", "A"), 1.0),
]  # fmt: skip
CASES += [
    Case("circular", f"rotations {answers}", lambda m, a=answers: score(m, *rows(*a)).score.value, RIGHT)
    for answers, RIGHT in SIX
]
RIGHT, WRONG = ("B", "C", "D", "A"), ("B", "C", "D", "D")
TWO = [
    (5, "logic", {"A": "yes", "B": "no"}, "A", "A"),
    (1_000_005, "logic", {"A": "no", "B": "yes"}, "B", "B"),
]
MIXED = [*rows(*RIGHT), *rows(*WRONG, index=4), *TWO]
SHUFFLED = [MIXED[place] for place in (9, 4, 3, 0, 8, 1, 7, 2, 6, 5)]


def values(m: ModuleType, *rows: tuple[Any, ...]) -> tuple[Any, ...]:
    found = score(m, *rows)
    by_category = sorted((name, part.value, part.n) for name, part in found.categories.items())
    return (found.score.value, found.score.n, *map(tuple, by_category))


BY_QUESTION = (2 / 3, 3, ("animals", 0.5, 2), ("logic", 1.0, 1))
UNREAD = rows("B", "C", None, "bird")
CASES += [
    Case("circular", "by question and category", lambda m: values(m, *MIXED), BY_QUESTION),
    Case("circular", "rows in another order", lambda m: values(m, *SHUFFLED), BY_QUESTION),
    Case(
        "circular",
        "in the order of the questions",
        lambda m: score(m, *SHUFFLED).score.points,
        (1.0, 0.0, 1.0),
    ),
    Case(
        "circular",
        "unread answers are said",
        lambda m: tuple((note.what, note.count) for note in score(m, *UNREAD).score.left_out),
        (("answers", 1), ("answers", 1)),
    ),
    Case(
        "circular",
        "a missing rotation",
        lambda m: score(m, *rows(*RIGHT), *rows(*RIGHT, index=4)[:2]),
        Refused("^mmbench_en, question 4: has 4 options, but row 2000004, its rotation 2, is missing; "),
    ),
    Case(
        "circular",
        "the first row is missing",
        lambda m: score(m, *rows(*RIGHT)[1:]),
        Refused("but row 3, "),
    ),
    Case(
        "circular",
        "the last row is missing",
        lambda m: score(m, *rows(*RIGHT)[:3]),
        Refused("but row 3000003, "),
    ),
    Case(
        "circular",
        "a row twice",
        lambda m: score(m, *rows(*RIGHT), rows(*RIGHT)[2]),
        Refused("^mmbench_en: question 2000003 is there twice"),
    ),
    Case(
        "circular",
        "too many rotations",
        lambda m: score(m, *TWO, (2_000_005, *TWO[1][1:])),
        Refused("^mmbench_en, question 5: row 2000005, its rotation 2, has 2 options"),
    ),
    Case(
        "circular",
        "options differ",
        lambda m: score(m, TWO[0], (1_000_005, "logic", PETS, "B", "B")),
        Refused("^mmbench_en, question 5: row 1000005, .*has 4 options where another row has 2"),
    ),
    Case(
        "circular",
        "a label outside the options",
        lambda m: score(m, (5, "logic", {"A": "yes"}, "B", "B")),
        Refused("^mmbench_en, question 5: the label is 'B'; write one of A,"),
    ),
    Case(
        "circular",
        "an option without text",
        lambda m: score(m, (5, "logic", {"A": "yes", "B": ""}, "A", "B")),
        Refused("^mmbench_en, question 5: .*'B': ''"),
    ),
    Case("circular", "no questions", lambda m: score(m), Refused("^mmbench_en: there are no questions")),
]


MUTATIONS = [
    Mutation("circular", "any rotation instead of all", "float(all(_chosen", "float(any(_chosen"),
    Mutation(
        "circular",
        "the first rotation alone",
        "for row in rotations.values()))",
        "for row in [rotations[0]]))",
    ),
    Mutation(
        "circular",
        "accuracy by row",
        "points[index] = float(all(_chosen(row) == row.label for row in rotations.values()))",
        "points[index] = sum(_chosen(row) == row.label for row in rotations.values()) / len(rotations)",
    ),
    Mutation("circular", "no letters are read", "if len(letters) == 1 and", "if False and"),
    Mutation("circular", "the first of several letters", "if len(letters) == 1 and", "if letters and"),
    Mutation(
        "circular",
        "case of letters does not count",
        "if letter in words]",
        "if letter in words or letter.lower() in words]",
    ),
    Mutation("circular", "letters within words", "if letter in words]", "if letter in answer]"),
    Mutation("circular", "the first word alone", ".split()\n", ".split()[:1]\n"),
    Mutation(
        "circular",
        "no punctuation around letters",
        "answer.translate(_PUNCTUATION).split()",
        "answer.split()",
    ),
    Mutation("circular", "no brackets around letters", '".()[],', '".,'),
    Mutation("circular", "no colon behind letters", "],:;", "],;"),
    Mutation(
        "circular",
        "A is always a letter",
        'and not (letters == ["A"] and len(words) > _MOST_WORDS_BESIDE_A)',
        "",
    ),
    Mutation(
        "circular",
        "A is never a letter",
        'and not (letters == ["A"] and len(words) > _MOST_WORDS_BESIDE_A)',
        'and letters != ["A"]',
    ),
    Mutation("circular", "A in four words", "_MOST_WORDS_BESIDE_A = 3", "_MOST_WORDS_BESIDE_A = 4"),
    Mutation("circular", "A in two words", "_MOST_WORDS_BESIDE_A = 3", "_MOST_WORDS_BESIDE_A = 2"),
    Mutation(
        "circular", "no letter in a long answer", 'not (letters == ["A"] and len(words)', "not (len(words)"
    ),
    Mutation(
        "circular",
        "texts are not read",
        "return contained[0] if len(contained) == 1 else None",
        "return None",
    ),
    Mutation(
        "circular",
        "the first of several texts",
        "return contained[0] if len(contained) == 1",
        "return contained[0] if contained",
    ),
    Mutation("circular", "case of texts counts", "text.lower() in answer.lower()", "text in answer"),
    Mutation(
        "circular", "texts have to equal", "text.lower() in answer.lower()", "text.lower() == answer.lower()"
    ),
    Mutation(
        "circular",
        "one category for all",
        "by_category.setdefault(rotations[0].category",
        'by_category.setdefault("all"',
    ),
    Mutation("circular", "each row is a question", "divmod(row.index, ROTATION)", "(0, row.index)"),
    Mutation(
        "circular",
        "rotations may be missing",
        "        if rotation not in rotations:\n",
        "        if False:\n",
    ),
    Mutation(
        "circular",
        "the last rotation may be missing",
        "for rotation in range(options):",
        "for rotation in range(options - 1):",
    ),
    Mutation(
        "circular", "rows may be there twice", "        if rotation in rotations:\n", "        if False:\n"
    ),
    Mutation("circular", "rotations beyond the options", "if rotation >= options or len", "if len"),
    Mutation(
        "circular",
        "numbers of options may differ",
        "if rotation >= options or len(row.options) != options:",
        "if rotation >= options:",
    ),
    Mutation("circular", "any label passes", "if row.label not in row.options:", "if False:"),
    Mutation(
        "circular",
        "an empty option passes",
        "or not isinstance(text, str) or not text:",
        "or not isinstance(text, str):",
    ),
    Mutation(
        "circular", "unread answers are not said", '*counted("answers", unread,', '*counted("answers", 0,'
    ),
]
