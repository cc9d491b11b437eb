"""Captions: CIDEr, Bleu, ROUGE_L and METEOR by pycocoevalcap 1.2, whose tokenizer and METEOR are Java programs.

CIDEr weighs words by how rare they are in the references of the very questions that are scored: a part of a test set
gives other values than the whole.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.scorers.scores import LeftOut, bad_label, no_answers, require_rows

METRICS = ("CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "METEOR")
"""Names of the scores, as pycocoevalcap has them."""
_Texts = dict[int, list[str]]


@dataclass(frozen=True)
class CaptionRow:
    """A picture: its id, the captions that people wrote, and the model's (None: it gave none)."""

    id: str | int
    references: tuple[str, ...]
    answer: str | None


@dataclass(frozen=True)
class CaptionScore:
    """One score of captions.

    Attributes:
        value: of all pictures together, 1 being 100 in tables; None without Java.
        points: of each picture where the value is their mean (CIDEr, ROUGE_L), else empty.
        n: how many pictures.
        left_out: what does not count like the rest.
    """

    value: float | None
    points: tuple[float, ...]
    n: int
    left_out: tuple[LeftOut, ...] = ()


def score_captions(task: str, rows: Sequence[CaptionRow], metric: str) -> CaptionScore:
    """One of `METRICS` over pictures. A picture without an answer has an empty caption.

    Raises:
        DataError: no rows, or a picture without captions of people; names task, picture and value.
    """
    require_rows(task, rows)
    for row in rows:
        if not row.references or not all(isinstance(text, str) and text.strip() for text in row.references):
            raise bad_label(task, row.id, row.references, "give the captions that people wrote")
    notes = no_answers([row.answer for row in rows])
    if shutil.which("java") is None:
        missing = LeftOut("scores", 1, "needs the program java, which is not installed: not worked out")
        return CaptionScore(None, (), len(rows), (*notes, missing))
    value, points = _computed(task, tuple(rows))[metric]
    return CaptionScore(value, points, len(rows), notes)


@lru_cache(maxsize=1)
def _computed(task: str, rows: tuple[CaptionRow, ...]) -> dict[str, tuple[float, tuple[float, ...]]]:
    """All scores at once: they share the tokenizer, a Java program that is started twice."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    found: dict[str, tuple[float, tuple[float, ...]]] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # Bleu prints
        try:
            references = _tokenized(PTBTokenizer(), [row.references for row in rows])
            captions = _tokenized(PTBTokenizer(), [(row.answer or "",) for row in rows])
            for name, scorer in (("CIDEr", Cider()), ("ROUGE_L", Rouge()), ("METEOR", Meteor())):
                value, points = scorer.compute_score(references, captions)
                mean = () if name == "METEOR" else tuple(float(point) for point in points)
                found[name] = (float(value), mean)
            bleu, _ = Bleu(4).compute_score(references, captions)
        except (OSError, ValueError, IndexError) as error:
            raise DataError(
                f"{task}: pycocoevalcap could not score the captions ({' '.join(str(error).split())[:200]}); check that "
                "`java -version` works"
            ) from error
    for number, value in enumerate(bleu, start=1):
        found[f"Bleu_{number}"] = (float(value), ())
    return found


def _tokenized(tokenizer: Any, texts: Sequence[Sequence[str]]) -> _Texts:
    """Words in lower case without punctuation. A caption is a line of the tokenizer's input: no line ends, no NUL."""
    lines = {number: [{"caption": _line(text)} for text in several] for number, several in enumerate(texts)}
    found: _Texts = tokenizer.tokenize(lines)
    return found


def _line(text: str) -> str:
    """The text on one line, without what cannot be passed to a Java program."""
    return " ".join(text.replace("\0", " ").encode("utf-8", "replace").decode().split())
