"""Captions: CIDEr, Bleu, ROUGE_L and METEOR, which need pycocoevalcap and java."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.scorers import captions
from megatron_eve.evaluation.scorers.captions import CaptionRow, CaptionScore, score_captions

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java: captions are not scored")

ROWS = [
    CaptionRow("a.jpg", ("A cat sits on a mat.", "a cat on the mat"), "A cat sits on a mat"),
    CaptionRow("b.jpg", ("A red cup of coffee.", "coffee in a red cup"), "a dog"),
    CaptionRow("c.jpg", ("Two dogs run.", "two dogs running"), "Two dogs run!"),
]


def score(rows: list[CaptionRow], metric: str) -> CaptionScore:
    pytest.importorskip("pycocoevalcap")
    return score_captions("karpathy", rows, metric)


@needs_java
def test_three_captions_get_the_published_values() -> None:
    cider, rouge_l = score(ROWS, "CIDEr"), score(ROWS, "ROUGE_L")
    assert cider.value == pytest.approx(3.8381, abs=5e-5)
    assert cider.points == pytest.approx((6.1674, 0.1386, 5.2083), abs=5e-5)
    assert rouge_l.value == pytest.approx(0.7551, abs=5e-5) and len(rouge_l.points) == 3
    bleu = [score(ROWS, f"Bleu_{n}").value for n in (1, 2, 3, 4)]
    assert bleu == pytest.approx([0.6921, 0.6790, 0.7054, 0.7190], abs=5e-5)
    assert cider.left_out == () and cider.n == 3 and score(ROWS, "Bleu_1").points == ()


@needs_java
def test_the_words_are_those_of_the_published_tokenizer() -> None:
    ptbtokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    texts = [
        "A man's dog - it isn't HIS.", '(two) cats; one: "black"', "50% of 1,000 cups...", "well-known T-shirt",
        "can't won't gonna", "a  b\n c", "", "...", "U.S. flags & more", "a/b $5.00 #1", "Caf\u00e9 \u72ac",
    ]  # fmt: skip
    published = ptbtokenizer.PTBTokenizer().tokenize({n: [{"caption": one}] for n, one in enumerate(texts)})
    found = captions._tokenized("karpathy", texts)
    assert {number: [one] for number, one in enumerate(found)} == published
    assert found[0].startswith("a man 's dog it is n't his") and found[7] == ""


ODD = (
    "",
    "\0",
    "a\ud800b",
    "a\u2028b\r\nc\x85d\x0ce",
    "x " * 5_000,
    "||| a ||| b",
    "Caf\u00e9 \u72ac",
    "?!.",
)


@needs_java
def test_any_caption_can_be_scored() -> None:
    rows = [CaptionRow(n, (f"a toy {n}", "a toy"), one) for n, one in enumerate(ODD)]
    rows.append(CaptionRow("same", ("one red toy",), "one red toy"))
    cider, rouge_l = score(rows, "CIDEr").points, score(rows, "ROUGE_L").points
    assert cider[-1] == max(cider) > 5 and cider[0] == rouge_l[0] == 0
    assert rouge_l[-1] == pytest.approx(1)  # a line more would shift the captions


@needs_java
def test_a_picture_without_an_answer_gets_nothing_and_is_counted() -> None:
    found = score([CaptionRow("a.jpg", ROWS[0].references, None), *ROWS[1:]], "CIDEr")
    assert found.points == pytest.approx((0, 0.1386, 5.2083), abs=5e-5)
    assert [(note.what, note.count) for note in found.left_out] == [("answers", 1)]


@pytest.mark.slow  # METEOR loads its tables for 10 s and more
@needs_java
def test_meteor_prefers_the_captions_of_people() -> None:
    same = score([CaptionRow(row.id, row.references, row.references[0]) for row in ROWS], "METEOR").value
    ours = score(ROWS, "METEOR").value
    odd = score([CaptionRow(n, ("a toy",), one) for n, one in enumerate(ODD)], "METEOR").value
    assert odd is not None and ours is not None and same is not None and 0 <= odd < ours < same


@pytest.mark.parametrize("references", [(), ("a cat", " "), ("a cat", None)])
def test_a_picture_that_nobody_described(references: tuple[str, ...]) -> None:
    with pytest.raises(
        DataError, match=r"^karpathy, question 7: the label is .*; give the captions that people"
    ):
        score_captions("karpathy", [CaptionRow(7, references, "a cat")], "CIDEr")


def test_without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = score_captions("karpathy", [CaptionRow(1, ("a cat",), "a cat")], "CIDEr")
    assert found.value is None and "needs the program java" in found.left_out[0].why


def test_a_java_that_does_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho no memory >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        DataError, match=r"split 0 of 2 captions into words \(no memory\); check that `java -version`"
    ):
        score([CaptionRow(1, ("a cat",), "a cat")], "CIDEr")
