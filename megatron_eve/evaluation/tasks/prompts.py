"""Questions as EVE and LLaVA ask them, without the picture's place and without the template of conversations.

Each function takes a document of its benchmark and returns the text of the question. Sources: LLaVA c121f04, EVE
cc63ec7, `playground/data/eval/` and the scripts beside it. Where the file of questions itself is not public in text,
the function says what was followed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_eve.data.text.questions import LETTER, LETTERS, SHORT_ANSWER, options

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
LETTER_CN = "\n请直接回答选项字母。"
_MME_SUFFIX = " Please answer yes or no."  # in the dataset, not in the published questions
_NO_TEXT = ("nan", "none")  # what an empty cell of MMBench's table has become

Document = Mapping[str, Any]


def short_answer(doc: Document) -> str:
    """VQAv2, GQA, POPE and OK-VQA."""
    return f"{doc['question'].strip()}{SHORT_ANSWER}"


def vizwiz(doc: Document) -> str:
    """VizWiz, where many pictures do not show what is asked."""
    return f"{doc['question'].strip()}{UNANSWERABLE}{SHORT_ANSWER}"


def textvqa(doc: Document) -> str:
    """TextVQA with the words that a reader of texts found in the picture."""
    tokens = ", ".join(doc["ocr_tokens"])
    return f"{doc['question'].strip()}\nReference OCR token: {tokens}{SHORT_ANSWER}"


def mme(doc: Document) -> str:
    """MME. The dataset ends each question with "Please answer yes or no.", the published questions do not."""
    return f"{doc['question'].strip().removesuffix(_MME_SUFFIX)}{SHORT_ANSWER}"


def science_qa(doc: Document) -> str:
    """ScienceQA: hint as context, question, choices; lines as in lmms-eval 0.7.3."""
    context = f"Context: {doc['hint']}\n" if doc["hint"] else ""
    return f"{context}{doc['question']}{options(doc['choices'])}{LETTER}"


def seed(doc: Document) -> str:
    """SEED-Bench."""
    return f"{doc['question']}{options([doc[f'choice_{letter}'] for letter in 'abcd'])}{LETTER}"


def mmbench_en(doc: Document) -> str:
    """MMBench: hint, question and options on lines of their own."""
    return f"{_mmbench(doc)}{LETTER}"


def mmbench_cn(doc: Document) -> str:
    """MMBench in Chinese."""
    return f"{_mmbench(doc)}{LETTER_CN}"


def _mmbench(doc: Document) -> str:
    hint = "" if is_empty(doc["hint"]) else f"{doc['hint']}\n"
    return f"{hint}{doc['question']}{options(list(mmbench_options(doc).values()))}"


def mmbench_options(doc: Document) -> dict[str, str]:
    """Letter -> text of the options that a question of MMBench has, two to four."""
    found = {}
    for letter in LETTERS[:4]:
        if is_empty(doc[letter]):
            break
        found[letter] = doc[letter]
    return found


def is_empty(cell: Any) -> bool:
    """True for a cell of MMBench's table without a text.

    Source: LLaVA c121f04, llava/eval/model_vqa_mmbench.py.
    """
    if isinstance(cell, str):
        return not cell or cell.lower() in _NO_TEXT
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def mmvet(doc: Document) -> str:
    """MM-Vet: the question alone."""
    return str(doc["question"])
