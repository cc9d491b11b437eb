"""A page of wrong answers with their pictures, for `tools/evaluate.py score --mistakes`."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_eve.data.errors import SkipRow
from megatron_eve.evaluation.answers import Answered
from megatron_eve.evaluation.measured import Measured
from megatron_eve.evaluation.requests import Request, rows_of
from megatron_eve.models.text_format import IMAGE_TOKEN

LONGEST_TEXT = 2000
"""Characters of a text that the page shows."""
_SIDE = 448  # pixels, the longer side of a picture on the page
_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Wrong answers</title>
<style>
body { font: 15px/1.45 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
article { border-top: 1px solid #ccc; padding: 1rem 0; overflow: auto; }
img { float: left; max-width: 14rem; max-height: 14rem; margin: 0 1rem .5rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; font: inherit; }
pre { padding-left: 5.5rem; text-indent: -5.5rem; overflow: hidden; }
b { display: inline-block; width: 5.5rem; color: #666; font-weight: normal; text-indent: 0; }
</style>
"""


def write_mistakes(
    path: Path,
    count: int,
    measured: Sequence[Measured],
    requests: Sequence[Request],
    found: Mapping[str, Answered],
) -> list[str]:
    """Write the page; returns the tasks that are not on it, since their harness does not say which answers are wrong.

    Args:
        path: of the page, HTML with the pictures inside.
        count: wrong answers of each task; which ones depends on the questions alone, so that pages of two models
            have the same where both are wrong.
        measured: main values of tasks, with their graded documents.
        requests: of all tasks.
        found: answer by key.
    """
    parts, left_out = [_HEAD], []
    for one in measured:
        if not one.main:
            continue
        rows = rows_of([request for request in requests if request.task == one.task])
        if not one.graded or len(one.graded) != len(rows):
            left_out.append(one.task)
            continue
        wrong = [(row, *grade) for row, grade in zip(rows, one.graded, strict=True) if grade[0] < 1]
        title = f"{one.task}: {len(wrong):,} of {len(rows):,} answers are wrong, or right in part"
        parts.append(f"<h2>{_shown(title)}</h2>\n")
        for row, points, label in sorted(wrong, key=lambda one: one[0][0].key)[:count]:
            parts += _article(row[0], points, label, _said(row, found))
    if left_out:
        why = "the harness has no number of 0 to 1 for each of their questions"
        parts.append(f"<p>Not on this page: {_shown(', '.join(left_out))}; {why}.</p>\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(parts), encoding="utf-8")
    return left_out


def _said(row: Sequence[Request], found: Mapping[str, Answered]) -> str:
    """The answer to a row: its text, or the most likely of its choices."""
    answers = [(one, found[one.key]) for one in row]
    likely = [
        (answer.log_likelihood, one.continuation)
        for one, answer in answers
        if answer.log_likelihood is not None
    ]
    if likely:
        return max(likely)[1]
    (_, answer) = answers[0]
    return answer.text if answer.error is None else f"none: {answer.error}"


def _article(request: Request, points: float, label: Mapping[str, Any], answer: str) -> Iterator[str]:
    yield f"<article id={request.key}>\n"
    try:
        conversation = request.conversation() if request.conversation is not None else None
        for image in conversation.images if conversation is not None else ():
            yield f'<img alt="" src="{_data_url(image)}">\n'
        said = "\n".join(turn.text for turn in conversation.turns) if conversation else request.context
    except SkipRow as error:
        said = f"{request.context}\n({error})"
    shown = {
        "row": f"{request.split} {request.doc_id}",
        "asked": said.replace(IMAGE_TOKEN, "").strip(),
        "answer": answer,
        **{name: value for name, value in label.items() if name not in ("id", "index")},
        "points": f"{points:.2g}",
    }
    for name, value in shown.items():
        yield f"<pre><b>{_shown(name)}</b>{_shown(value)}</pre>\n"
    yield "</article>\n"


def _shown(value: object) -> str:
    """A text as HTML, cut where it is long; what cannot be written as UTF-8 stands there as an escape."""
    text = str(value)
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]} ... ({len(text):,} characters)"
    return html.escape(text.replace("\0", "\\0")).encode("utf-8", "backslashreplace").decode()


def _data_url(picture: bytes) -> str:
    with Image.open(io.BytesIO(picture)) as opened:
        small = opened.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
