"""How the VQA benchmarks bring an answer into the form that is compared.

Two published forms. `process_answer` is EvalAI's (mmf's `EvalAIAnswerProcessor`, which LLaVA, lmms-eval and others
copy); `process_as_vqa_tool` is the one of the VQA tool (GT-Vision-Lab/VQA, vqaEval.py), which lacks its first step, so
that commas still stand when punctuation is judged. Both are followed to the letter, oddities too, since published
numbers were made with them.
"""

from __future__ import annotations

import re

# In this order. Each is judged on the text as it came, and replaced in what the ones before it have left.
_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The published pattern is (?!<=\d)(\.)(?!\d): a slip for "no digit before it", so that the literal text <= is looked
# for, which a full stop never is. What is left: a full stop that no digit follows.
_FULL_STOP = re.compile(r"\.(?!\d)")
# The published call passes a flag in the place of the count of replacements: re.UNICODE, which is 32.
_MOST_FULL_STOPS = 32

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = frozenset({"a", "an", "the"})

# A word that is one of these but for one apostrophe gets it.
_CONTRACTED = (
    "ain't", "aren't", "can't", "could've", "couldn't", "couldn't've", "didn't", "doesn't", "don't", "hadn't",
    "hadn't've", "hasn't", "haven't", "he'd", "he'd've", "he's", "how'd", "how'll", "how's", "isn't",
    "it'd", "it'd've", "it'll", "ma'am", "mightn't", "mightn't've", "might've", "mustn't", "must've", "needn't",
    "not've", "o'clock", "oughtn't", "'ow's'at", "shan't", "she'd've", "should've", "shouldn't", "shouldn't've",
    "somebody'd've", "somebody'll", "somebody's", "someone'd", "someone'd've", "someone'll", "someone's", "something'd",
    "something'd've", "something'll", "that's", "there'd", "there'd've", "there're", "there's", "they'd",
    "they'd've", "they'll", "they're", "they've", "'twas", "wasn't", "we'd've", "we've", "weren't", "what'll",
    "what're", "what's", "what've", "when's", "where'd", "where's", "where've", "who'd", "who'd've", "who'll",
    "who's", "who've", "why'll", "why're", "why's", "won't", "would've", "wouldn't", "wouldn't've", "y'all",
    "y'all'll", "y'all'd've", "you'd", "you'd've", "you'll", "you're", "you've",
)  # fmt: skip
# The published table has it so: it takes the apostrophe away.
_ODD_CONTRACTION = {"somebody'd": "somebodyd"}


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {
    short: word for word in _CONTRACTED for short in _without_one_apostrophe(word)
} | _ODD_CONTRACTION
"""A word without one of its apostrophes -> with it; of the published table what lower case can meet."""


def process_answer(text: str) -> str:
    """An answer as EvalAI compares it: "The dog's tail" -> "dog 's tail", "Two." -> "2", "1,000-2,000" -> "1000 2000".

    Lower case; commas and question marks dropped, 's set apart; then punctuation and words as in the VQA tool.

    Source: mmf c46b3b3, pythia/tasks/processors.py, by way of LLaVA c121f04, llava/eval/m4c_evaluator.py.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return process_as_vqa_tool(text)


def process_as_vqa_tool(text: str) -> str:
    """An answer as the VQA tool compares it where people disagree: "1,000-2,000" -> "10002000".

    Source: GT-Vision-Lab/VQA a013f00, vqaEval.py, processPunctuation and processDigitArticle.
    """
    return _process_words(_process_punctuation(one_line(text)))


def one_line(text: str) -> str:
    """The text without line ends, tabs and spaces around it, which is all that happens where people agree."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def _process_punctuation(text: str) -> str:
    """Drop or space out punctuation: a mark with a space on one side anywhere is dropped from the whole text."""
    drop_all = _DIGIT_COMMA_DIGIT.search(text) is not None
    result = text
    for mark in [mark for mark in _PUNCTUATION if mark in text]:  # most answers have none
        drop = drop_all or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if drop else " ")
    return _FULL_STOP.sub("", result, count=_MOST_FULL_STOPS)


def _process_words(text: str) -> str:
    """Numbers up to ten as digits, articles dropped, apostrophes of contractions; one space between words."""
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
