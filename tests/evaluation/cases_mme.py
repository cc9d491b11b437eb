"""Cases of MME, and the changes of its rules that they have to notice."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from tests.evaluation.case import Case, Mutation, Refused

READ = [
    ("Yes", True), ("no", False), ("No.", False), ("Y", True), ("n.", False), ("x", None), ("", None),
    ("Not at all", False), ("know", False), ("I think yes", None), ("The answer is no", None), ("Yes, it is", True),
    ("a yes", None), (" yes", True), ("y e s", None), ("... yes", True), ("   y", True), ("    yes", True),
    ("oh no", None), ("Yeah", None),
]  # fmt: skip
CASES: list[Case] = [
    Case("mme", f"read {text!r}", lambda m, text=text: m.read_answer(text), says) for text, says in READ
]


def score(m: ModuleType, *rows: tuple[Any, Any, Any, Any]) -> Any:
    return m.score_mme("mme", [m.MMERow(*row) for row in rows])


def pictures(category: str, *answers: str | None) -> list[tuple[Any, Any, Any, Any]]:
    """Two questions a picture, the first to be answered with Yes."""
    return [(category, f"{n // 2}.jpg", ("Yes", "No")[n % 2], answer) for n, answer in enumerate(answers)]


def notes(found: Any) -> tuple[Any, ...]:
    return tuple((note.what, note.count) for note in found.left_out)


THREE = pictures("existence", "Yes", "No", "Yes", "Yes")
SPLIT = pictures("existence", "Yes", "Yes", "No", "No")
FULL = ("Yes", "No")
NAMES = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
OTHERS = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
WHOLE = [row for name in NAMES + OTHERS for row in pictures(name, *FULL)]
SOME = [*THREE, *pictures("OCR", *FULL), *pictures("code_reasoning", "No", "Yes")]
CASES += [
    Case("mme", "three of four right", lambda m: score(m, *THREE).perception, 125.0),
    Case("mme", "one right of each picture", lambda m: score(m, *SPLIT).perception, 50.0),
    Case(
        "mme",
        "at most",
        lambda m: (score(m, *WHOLE).perception, score(m, *WHOLE).cognition),
        (2000.0, 800.0),
    ),
    Case(
        "mme",
        "whole: nothing to say",
        lambda m: (score(m, *WHOLE).n, score(m, *WHOLE).left_out),
        (28, ()),
    ),
    Case("mme", "sums", lambda m: (score(m, *SOME).perception, score(m, *SOME).cognition), (325.0, 0.0)),
    Case(
        "mme",
        "one category",
        lambda m: (lambda c: (c.n, c.accuracy, c.accuracy_plus))(score(m, *SOME).categories["existence"]),
        (4, 0.75, 0.5),
    ),
    Case(
        "mme",
        "missing categories are said",
        lambda m: notes(score(m, *SOME)),
        (("categories", 8), ("categories", 3)),
    ),
    Case(
        "mme",
        "answers that are neither",
        lambda m: notes(score(m, *WHOLE[:-1], (*WHOLE[-1][:3], "I think no"))),
        (("answers", 1),),
    ),
    Case("mme", "neither is wrong", lambda m: score(m, *pictures("color", "Yes", "maybe")).perception, 50.0),
    Case("mme", "no answer is wrong", lambda m: score(m, *pictures("color", "Yes", None)).perception, 50.0),
    Case(
        "mme",
        "no answer is said",
        lambda m: notes(score(m, *WHOLE[:-1], (*WHOLE[-1][:3], None))),
        (("answers", 1),),
    ),
    Case(
        "mme",
        "names of pictures repeat between categories",
        lambda m: score(m, *pictures("color", *FULL), *pictures("count", *FULL)).perception,
        400.0,
    ),
    Case(
        "mme",
        "three questions to a picture",
        lambda m: score(m, *WHOLE, ("OCR", "0.jpg", "No", "No")),
        Refused("^mme, picture 0.jpg of OCR: has 3 questions instead of 2; "),
    ),
    Case(
        "mme",
        "one question to a picture",
        lambda m: score(m, *THREE[:3]),
        Refused("1.jpg of existence: has 1 "),
    ),
    Case(
        "mme",
        "a label that is neither",
        lambda m: score(m, ("OCR", "0.jpg", "maybe", "No")),
        Refused("^mme, question about picture 0.jpg of OCR: the label is 'maybe'; "),
    ),
    Case(
        "mme",
        "an unknown category",
        lambda m: score(m, ("ocr", "0.jpg", "No", "No")),
        Refused("^mme, picture 0.jpg: unknown category 'ocr'; .*OCR"),
    ),
    Case("mme", "no questions", lambda m: score(m), Refused("^mme: there are no questions")),
]


MUTATIONS = [
    Mutation("mme", "one right of a picture is enough", "fmean(all(right)", "fmean(any(right)"),
    Mutation(
        "mme",
        "acc+ by question",
        "fmean(all(right) for right in pictures.values())",
        "fmean(one for one in questions)",
    ),
    Mutation("mme", "no acc+", "100 * (self.accuracy + self.accuracy_plus)", "100 * self.accuracy"),
    Mutation("mme", "the mean of the two", "100 * (self.accuracy", "50 * (self.accuracy"),
    Mutation(
        "mme",
        "the sum is a mean",
        "if name in self.categories), 0.0)",
        "if name in self.categories), 0.0) / len(self.categories)",
    ),
    Mutation(
        "mme", "cognition counts as perception", "self._sum(PERCEPTION)", "self._sum(PERCEPTION + COGNITION)"
    ),
    Mutation("mme", "full stops stay", '.replace(".", "")', ""),
    Mutation("mme", "case counts", "answer.lower()", "answer"),
    Mutation("mme", "spaces around count", ".strip()", ""),
    Mutation("mme", "no single letters", 'text in ("y", "n")', "False"),
    Mutation(
        "mme",
        "a first letter is enough",
        'if text in ("y", "n"):\n        return text == "y"',
        'if text[:1] in ("y", "n"):\n        return text[0] == "y"',
    ),
    Mutation("mme", "three characters are read", "_PREFIX = 4", "_PREFIX = 3"),
    Mutation("mme", "five characters are read", "_PREFIX = 4", "_PREFIX = 5"),
    Mutation("mme", "the whole answer is read", "text[:_PREFIX]", "text"),
    Mutation("mme", "the answer has to begin so", '"yes" in beginning', 'beginning.startswith("yes")'),
    Mutation("mme", "anything else is no", 'return False if "no" in beginning else None', "return False"),
    Mutation(
        "mme",
        "anything else is yes",
        'return False if "no" in beginning else None',
        'return "no" not in beginning',
    ),
    Mutation(
        "mme",
        "pictures of all categories share names",
        "setdefault(row.category, {})",
        'setdefault("count", {})',
    ),
    Mutation("mme", "any number of questions", "len(right) != _QUESTIONS", "False"),
    Mutation("mme", "more than two questions pass", "len(right) != _QUESTIONS", "len(right) < _QUESTIONS"),
    Mutation("mme", "one question passes", "len(right) != _QUESTIONS", "len(right) > _QUESTIONS"),
    Mutation("mme", "unknown categories pass", "row.category not in PERCEPTION + COGNITION", "False"),
    Mutation(
        "mme", "missing categories are not said", '        *_missing("perception", PERCEPTION, right),\n', ""
    ),
    Mutation(
        "mme",
        "answers that are neither are not said",
        '        *counted("answers", unread,',
        '        *counted("answers", 0,',
    ),
]
