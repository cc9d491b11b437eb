"""Captions: CIDEr, Bleu, ROUGE_L and METEOR by pycocoevalcap 1.2, whose tokenizer and METEOR are Java programs.

CIDEr weighs words by how rare they are in the references of the very questions that are scored: a part of a test set
gives other values than the whole.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.scorers.scores import LeftOut, bad_label, no_answers, require_rows

METRICS = ("CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "METEOR")
"""Names of the scores, as pycocoevalcap has them."""
_Texts = dict[int, list[str]]
_CHECK = "check that `java -version` works"


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
    value, points = _computed(task, tuple(rows), metric)
    return CaptionScore(value, points, len(rows), notes)


def _computed(task: str, rows: tuple[CaptionRow, ...], metric: str) -> tuple[float, tuple[float, ...]]:
    """One score, and the points of each picture where it is their mean. METEOR loads its tables for seconds."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    captions, references = _words(task, rows)
    if metric.startswith("Bleu"):
        bleu, _ = Bleu(4).compute_score(references, captions, verbose=0)
        return float(bleu[int(metric[-1]) - 1]), ()
    if metric == "METEOR":
        try:
            return float(Meteor().compute_score(references, captions)[0]), ()
        except (OSError, ValueError) as error:
            raise DataError(
                f"{task}: METEOR, a Java program, did not score the captions ({' '.join(str(error).split())[:200]}); "
                f"{_CHECK}"
            ) from error
    value, points = (Cider() if metric == "CIDEr" else Rouge()).compute_score(references, captions)
    return float(value), tuple(float(point) for point in points)


@lru_cache(maxsize=1)
def _words(task: str, rows: tuple[CaptionRow, ...]) -> tuple[_Texts, _Texts]:
    """The model's captions and people's, as words; kept, since each score of the same rows asks for them anew."""
    lines = iter(_tokenized(task, [text for row in rows for text in (row.answer or "", *row.references)]))
    captions, references = {}, {}
    for number, row in enumerate(rows):
        captions[number] = [next(lines)]
        references[number] = [next(lines) for _ in row.references]
    return captions, references


def _tokenized(task: str, texts: Sequence[str]) -> list[str]:
    """Texts as words in lower case without punctuation.

    As pycocoevalcap's PTBTokenizer, which writes its input beside its own files, where a user may not write, and does
    not notice if lines are missing in what comes out.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "utf-8"]
    given = "".join(f"{_line(text)}\n" for text in texts)
    run = subprocess.run(command, input=given.encode(), capture_output=True)
    lines = run.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if run.returncode or len(lines) != len(texts):
        said = run.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
        raise DataError(
            f"{task}: java split {len(lines)} of {len(texts)} captions into words ({said[-1][:200]}); {_CHECK}"
        )
    left_out = frozenset(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in left_out) for line in lines]


def _line(text: str) -> str:
    """The text on one line, without what cannot be passed to a Java program."""
    return " ".join(text.replace("\0", " ").encode("utf-8", "replace").decode().split())
