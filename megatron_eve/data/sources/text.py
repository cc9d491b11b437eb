"""Text without pictures: JSON lines of `{"text"}`, or of FLAN's `{"inputs", "targets"}`."""

from __future__ import annotations

from typing import Any

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import Kind, Record
from megatron_eve.data.sources.fields import plain_text, source_name
from megatron_eve.data.sources.json_source import JsonSource
from megatron_eve.data.sources.source import RawRow
from megatron_eve.data.text.conversation import is_blank


class TextSource(JsonSource):
    """Rows of text.

    `{"text": ...}` becomes a record of kind "text". `{"inputs": ..., "targets": ...}` (github.com/google-research/FLAN)
    becomes a conversation of one question and its answer. `id` is kept if there is one; other keys go into `meta`.

    Args:
        files: JSON lines, or JSON arrays.
        image_root: not used.

    Raises:
        DataError: while iterating, a file cannot be read further.
    """

    def _record(self, row: RawRow, fields: dict[str, Any]) -> Record:
        kind: Kind
        used: tuple[str, ...]
        if "text" in fields:
            used, kind = ("text",), "text"
        elif "inputs" in fields and "targets" in fields:
            used, kind = ("inputs", "targets"), "conversation"
        else:
            raise SkipRow("text_field", f"it has {', '.join(map(repr, fields))!s:.200}")
        texts = [plain_text(fields[key], key) for key in used]
        if is_blank(texts[-1]):
            raise SkipRow("nothing_to_train", f"{used[-1]!r} is blank")
        roles = ("human", "gpt")[-len(used) :]
        name = fields.get("id")
        return Record(
            id=None if name is None else str(name),
            source=source_name(row.file),
            kind=kind,
            images=[],
            turns=[{"from": role, "value": text} for role, text in zip(roles, texts, strict=True)],
            meta={key: value for key, value in fields.items() if key not in (*used, "id")},
        )
