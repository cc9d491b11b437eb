"""Cases of POPE, and the changes of its rules that they have to notice."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from tests.evaluation.case import Case, Mutation, Refused

POPE_ANSWERS = [
    ("Yes", "yes", True),
    ("Yes, there is a cat.", "yes", True),
    ("No", "yes", False),
    ("There is not a cat", "no", False),
    ("NO", "no", True),
    ("Nope.", "no", True),
    ("yes.", "no", True),
    ("no, none. Yes", "no", False),
]

READ = [(text, says) for text, _, says in POPE_ANSWERS]
READ += [
    ("Yes. No", True),
    ("not,", False),
    ("Yes\nno", True),
    ("Yes no", False),
    ("", True),
    ("I know", True),
]
READ += [("nothing", True), ("Not", True), ("n,o", False), ("no!", True)]
CASES: list[Case] = [
    Case("pope", f"read {text!r}", lambda m, text=text: m.says_yes(text), says) for text, says in READ
]


def score(m: ModuleType, *rows: tuple[Any, Any, Any, Any]) -> Any:
    return m.score_pope("pope_adversarial", [m.POPERow(*row) for row in rows])


def values(m: ModuleType, *rows: tuple[Any, Any, Any, Any]) -> tuple[Any, ...]:
    (c,) = score(m, *rows).categories.values()
    counts = (c.true_positives, c.false_positives, c.true_negatives, c.false_negatives)
    return (*counts, c.accuracy, c.precision, c.recall, c.f1, c.yes_ratio)


def notes(found: Any) -> tuple[Any, ...]:
    return tuple(note.what for note in found.left_out)


EIGHT = [(n, "random", label, text) for n, (text, label, _) in enumerate(POPE_ANSWERS)]
ALWAYS = [(1, "random", "yes", "Yes"), (2, "random", "no", "Yes"), (3, "random", "no", "Yes")]
NEVER = [(1, "random", "yes", "No"), (2, "random", "no", "No")]
THREE = [*EIGHT, (9, "popular", "yes", "Yes"), (10, "adversarial", "yes", "No")]
CASES += [
    Case("pope", "eight answers", lambda m: values(m, *EIGHT), (2, 3, 2, 1, 0.5, 0.4, 2 / 3, 0.5, 0.625)),
    Case("pope", "always yes", lambda m: values(m, *ALWAYS), (1, 2, 0, 0, 1 / 3, 1 / 3, 1.0, 0.5, 1.0)),
    Case("pope", "never yes", lambda m: values(m, *NEVER), (0, 0, 1, 1, 0.5, 0.0, 0.0, 0.0, 0.0)),
    Case(
        "pope",
        "never yes is said",
        lambda m: notes(score(m, *NEVER)),
        ("precision of random", "F1 of random"),
    ),
    Case(
        "pope",
        "no label yes is said",
        lambda m: notes(score(m, (1, "random", "no", "Yes"))),
        ("recall of random", "F1 of random"),
    ),
    Case(
        "pope",
        "mean of the categories",
        lambda m: (score(m, *THREE).value, score(m, *THREE).n),
        (0.5, 10),
    ),
    Case("pope", "mean of F1, not of accuracy", lambda m: score(m, *ALWAYS).value, 0.5),
    Case(
        "pope",
        "by category",
        lambda m: tuple(c.f1 for c in score(m, *THREE).categories.values()),
        (0.5, 1.0, 0.0),
    ),
    Case("pope", "nothing to say", lambda m: notes(score(m, *EIGHT)), ()),
    Case(
        "pope",
        "no answer, label yes",
        lambda m: values(m, (1, "random", "yes", None)),
        (0, 0, 0, 1, 0.0, 0.0, 0.0, 0.0, 0.0),
    ),
    Case(
        "pope",
        "no answer, label no",
        lambda m: values(m, (1, "random", "no", None)),
        (0, 1, 0, 0, 0.0, 0.0, 0.0, 0.0, 1.0),
    ),
    Case(
        "pope",
        "no answer is said",
        lambda m: notes(score(m, *EIGHT, (9, "random", "no", None))),
        ("answers",),
    ),
    Case("pope", "a label in capitals", lambda m: values(m, (1, "random", "Yes", "Yes"))[0], 1),
    Case(
        "pope",
        "a label that is neither",
        lambda m: score(m, *EIGHT, (314, "random", "maybe", "Yes")),
        Refused("^pope_adversarial, question 314: the label is 'maybe'; "),
    ),
    Case(
        "pope",
        "no label",
        lambda m: score(m, (315, "random", None, "Yes")),
        Refused("question 315.*None"),
    ),
    Case("pope", "no questions", lambda m: score(m), Refused("^pope_adversarial: there are no questions")),
]


MUTATIONS = [
    Mutation("pope", "split at any white space", '.split(" ")', ".split()"),
    Mutation("pope", "the whole answer is read", '.split(".")[0]', ""),
    Mutation("pope", "the last sentence is read", '.split(".")[0]', '.split(".")[-1]'),
    Mutation("pope", "commas stay", '.replace(",", "")', ""),
    Mutation("pope", "commas split words", '.replace(",", "")', '.replace(",", " ")'),
    Mutation("pope", "case does not count", "words = answer.split", "words = answer.lower().split"),
    Mutation(
        "pope",
        "parts of words count",
        "_NO_WORDS.isdisjoint(words)",
        "not any(no in answer.split('.')[0] for no in _NO_WORDS)",
    ),
    Mutation("pope", "not is no word of it", '"No", "not", "no"', '"No", "no"'),
    Mutation("pope", "No is no word of it", '"No", "not", "no"', '"not", "no"'),
    Mutation("pope", "no is no word of it", '"No", "not", "no"', '"No", "not"'),
    Mutation("pope", "yes where it says yes", "_NO_WORDS.isdisjoint(words)", '"yes" in answer.lower()'),
    Mutation(
        "pope",
        "yes ratio of the labels",
        "_ratio(self._yes, self.n)",
        "_ratio(self.true_positives + self.false_negatives, self.n)",
    ),
    Mutation(
        "pope",
        "precision among all",
        "_ratio(self.true_positives, self._yes)",
        "_ratio(self.true_positives, self.n)",
    ),
    Mutation(
        "pope",
        "recall among answers",
        "self.true_positives + self.false_negatives)\n\n    @property\n    def f1",
        "self._yes)\n\n    @property\n    def f1",
    ),
    Mutation(
        "pope",
        "F1 is accuracy",
        "_ratio(2 * self.true_positives, 2 * self.true_positives + wrong)",
        "self.accuracy",
    ),
    Mutation(
        "pope",
        "accuracy of the positives",
        "self.true_positives + self.true_negatives, self.n)",
        "self.true_positives, self.n)",
    ),
    Mutation(
        "pope",
        "negative is the positive class",
        "((True, True), (True, False), (False, False), (False, True))",
        "((False, False), (False, True), (True, True), (True, False))",
    ),
    Mutation("pope", "one category for all", "counts.setdefault(row.category,", 'counts.setdefault("all",'),
    Mutation("pope", "mean of accuracies", "fmean(counts.f1", "fmean(counts.accuracy"),
    Mutation(
        "pope", "no answer is read as yes", "(not label) if row.answer is None", "True if row.answer is None"
    ),
    Mutation(
        "pope", "no answer is right", "(not label) if row.answer is None", "label if row.answer is None"
    ),
    Mutation("pope", "division by zero", "part / whole if whole else 0.0", "part / whole"),
    Mutation(
        "pope", "nothing positive is 1", "part / whole if whole else 0.0", "part / whole if whole else 1.0"
    ),
    Mutation("pope", "zeros are not said", "        if not self._yes:\n", "        if False:\n"),
    Mutation(
        "pope",
        "recall of zero is not said",
        "        if not self.true_positives + self.false_negatives:\n",
        "        if False:\n",
    ),
]
