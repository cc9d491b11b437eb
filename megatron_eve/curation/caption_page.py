"""The page about new captions: beside each picture its prompt, the old caption and the new one; one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import pyarrow
from numpy.typing import NDArray
from PIL import Image

from megatron_eve.curation.captions_of_records import caption_of
from megatron_eve.curation.clusters import evenly_spaced
from megatron_eve.curation.reasons import find_reason
from megatron_eve.curation.thumbnails import Place, picture_html, records_at, thumbnail
from megatron_eve.curation.work import Work
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.inspecting.html import html_page, table

SHOWN_CAPTIONS, SHOWN_OF_REASON = 24, 4
_MOST_SHARDS = 8  # that are read
_SIDE = 280  # pixels of a picture's longer side
_SEED = 0


@dataclass(frozen=True)
class ShownCaption:
    """One row of the page.

    Attributes:
        name: shard, row and id.
        picture: made small, or why there is none.
        prompt: that the model was asked with.
        old: the caption before; empty where there was none.
        new: the model's answer; None where there is none.
        reason, detail: why the row is dropped; None of one that is kept.
    """

    name: str
    picture: Image.Image | str
    prompt: str
    old: str
    new: str | None
    reason: str | None
    detail: str | None


def shown_captions(work: Work, stage: str, prompt_of: Callable[[int, int], str]) -> list[ShownCaption]:
    """Rows drawn at random: new captions that are kept, and some dropped rows of each reason.

    Args:
        work: the curation.
        stage: whose tables are read.
        prompt_of: the prompt of a row, by the numbers of shard and row.
    """
    shards = evenly_spaced(np.arange(len(work.inputs)), _MOST_SHARDS).tolist()
    chosen: dict[Place, dict[str, str | None]] = {}
    for shard in shards:
        answers = work.read_table(stage, shard, ("row", "caption", "reason", "detail"))
        chosen |= {(shard, row.pop("row")): row for row in _drawn(answers, len(shards)).to_pylist()}
    return [
        ShownCaption(
            name=f"shard {place[0]}, row {place[1]}" + (f", {record.id}" if record.id else ""),
            picture=thumbnail(record, _SIDE),
            prompt=prompt_of(*place),
            old="" if isinstance(record, SkipRow) else caption_of(record) or "",
            new=chosen[place]["caption"],
            reason=chosen[place]["reason"],
            detail=chosen[place]["detail"],
        )
        for place, record in records_at(work, chosen)
    ]


def _drawn(answers: pyarrow.Table, shards: int) -> pyarrow.Table:
    """The rows of one shard that are shown: its part of each group, at least one."""
    rng = np.random.default_rng(_SEED)
    reasons = np.array(answers["reason"].to_pylist(), dtype=object)
    new = np.array(answers["caption"].is_valid())
    groups: list[tuple[NDArray[np.bool_], int]] = [(new & (reasons == None), SHOWN_CAPTIONS)]  # noqa: E711
    groups += [(reasons == reason, SHOWN_OF_REASON) for reason in sorted({one for one in reasons if one})]
    drawn = [rng.permutation(np.flatnonzero(group))[: max(1, most // shards)] for group, most in groups]
    return answers.take(np.sort(np.concatenate(drawn)))


def caption_page(name: str, facts: Sequence[tuple[str, str]], shown: Sequence[ShownCaption]) -> str:
    """The text of the page.

    Args:
        name: of the work folder.
        facts: rows of the summary.
        shown: rows with their pictures.
    """
    kept = "".join(_row(one) for one in shown if one.reason is None)
    dropped = []
    for reason in sorted({one.reason for one in shown if one.reason is not None}):
        rows = "".join(_row(one) for one in shown if one.reason == reason)
        dropped.append(f"<h2>Dropped: {escape(reason)}</h2><p>{escape(find_reason(reason).what)}.</p>{rows}")
    return html_page(
        name,
        f"<h1>New captions {escape(name)}</h1><h2>Counts</h2>{table(facts)}"
        f"<h2>Rows drawn at random</h2>{kept or '<p>None.</p>'}{''.join(dropped)}",
    )


def _row(one: ShownCaption) -> str:
    if isinstance(one.picture, str):
        picture = f'<span class="wrong">{escape(one.picture)}</span>'
    else:
        picture = picture_html(one.picture, one.name)
    lines = [("prompt", one.prompt), ("old caption", one.old or "none")]
    lines += [] if one.new is None else [("new caption", one.new)]
    text = "".join(
        f'<p class="text"><span class="role">{label}</span>\n{escape(said)}</p>' for label, said in lines
    )
    if one.detail:
        text += f'<p class="wrong">{escape(one.detail)}</p>'
    cells = f'<td style="width: {_SIDE}px">{picture}</td><td>{text}</td>'
    return f"<h3>{escape(one.name)}</h3><table><tr>{cells}</tr></table>"
