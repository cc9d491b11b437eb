"""Words in which LLaVA and EVE ask short questions and multiple choice, in training data and in benchmarks.

Source: LLaVA c121f04 (docs/Evaluation.md, `playground/data/eval/`), whose mix-665K has the same words; EVE cc63ec7.
"""

from __future__ import annotations

from collections.abc import Sequence

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""Behind a question whose answer is a word or two."""

LETTER = "\nAnswer with the option's letter from the given choices directly."
"""Behind the options of a multiple-choice question."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Names of the options of a multiple-choice question, in order."""


def options(texts: Sequence[str]) -> str:
    """Options on lines of their own, each behind its letter."""
    return "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))
