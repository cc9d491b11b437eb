"""POPE: is an object in the picture, yes or no. Scored by category, as its authors and LLaVA do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_eve.evaluation.scorers.scores import LeftOut, no_answers, require_rows, yes_or_no

_NO_WORDS = frozenset({"No", "not", "no"})  # these spellings alone: "NO" is not among them
# (the answer says yes, the label is yes), in the order of the fields of YesNoCounts.
_OUTCOMES = ((True, True), (True, False), (False, False), (False, True))


@dataclass(frozen=True)
class POPERow:
    """A question: its id, its category (adversarial, popular, random), the label yes or no, and the model's answer."""

    id: str | int
    category: str
    label: str
    answer: str | None


@dataclass(frozen=True)
class YesNoCounts:
    """Answers by what was right; yes is positive. Values without a denominator are 0, and `left_out` says so.

    Attributes:
        true_positives, false_positives, true_negatives, false_negatives: numbers of questions.
    """

    true_positives: int = 0
    false_positives: int = 0
    true_negatives: int = 0
    false_negatives: int = 0

    @property
    def n(self) -> int:
        """How many questions."""
        return self._yes + self.true_negatives + self.false_negatives

    @property
    def _yes(self) -> int:
        return self.true_positives + self.false_positives

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return _ratio(self.true_positives + self.true_negatives, self.n)

    @property
    def precision(self) -> float:
        """Share of right answers among those that say yes."""
        return _ratio(self.true_positives, self._yes)

    @property
    def recall(self) -> float:
        """Share of the questions with label yes that were answered so."""
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        wrong = self.false_positives + self.false_negatives
        return _ratio(2 * self.true_positives, 2 * self.true_positives + wrong)

    @property
    def yes_ratio(self) -> float:
        """Share of the answers, not of the labels, that say yes."""
        return _ratio(self._yes, self.n)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Which values have no denominator."""
        found = []
        if not self._yes:
            found.append(LeftOut("precision", 1, "no answer is yes: reported as 0"))
        if not self.true_positives + self.false_negatives:
            found.append(LeftOut("recall", 1, "no label is yes: reported as 0"))
        if not self.true_positives:
            found.append(LeftOut("F1", 1, "no yes is right: reported as 0"))
        return tuple(found)


@dataclass(frozen=True)
class POPEScore:
    """Counts of each category, in the order in which they came, and what does not count like the rest."""

    categories: dict[str, YesNoCounts]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def n(self) -> int:
        """How many questions."""
        return sum(counts.n for counts in self.categories.values())

    @property
    def value(self) -> float:
        """Mean F1 of the categories, 0 to 1: what tables have as POPE (LLaVA-1.5-7B: 85.9)."""
        return fmean(counts.f1 for counts in self.categories.values())


def says_yes(answer: str) -> bool:
    """Read an answer: false if a word of its first sentence is `No`, `not` or `no`, else true.

    The sentence goes up to the first full stop; commas are dropped, and words stand between single spaces, so that
    "NO", "Nope" and an empty answer say yes.

    Source: LLaVA c121f04, llava/eval/eval_pope.py; AoiDragon/POPE, evaluate.py.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return _NO_WORDS.isdisjoint(words)


def score_pope(task: str, rows: Sequence[POPERow]) -> POPEScore:
    """POPE by category. A question without an answer counts as answered wrongly.

    Raises:
        DataError: no rows, or a label that is neither yes nor no; names task, question and value.
    """
    require_rows(task, rows)
    counts: dict[str, dict[tuple[bool, bool], int]] = {}
    for row in rows:
        label = yes_or_no(task, row.id, row.label)
        said = (not label) if row.answer is None else says_yes(row.answer)
        category = counts.setdefault(row.category, dict.fromkeys(_OUTCOMES, 0))
        category[said, label] += 1
    categories = {
        name: YesNoCounts(*(found[outcome] for outcome in _OUTCOMES)) for name, found in counts.items()
    }
    undefined = [
        LeftOut(f"{note.what} of {name}", note.count, note.why)
        for name, found in categories.items()
        for note in found.left_out
    ]
    return POPEScore(categories, (*no_answers([row.answer for row in rows]), *undefined))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
