"""Instructions without pictures: FLAN and other JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from megatron_eve.curation.preparing.llava import check_answers
from megatron_eve.curation.preparing.preparer import Preparer
from megatron_eve.curation.preparing.reasons import EVAL_SPLIT
from megatron_eve.curation.preparing.splits import is_eval_split
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import Record
from megatron_eve.data.sources.conversation_rows import KEYS
from megatron_eve.data.sources.llava import LlavaSource
from megatron_eve.data.sources.source import RawRow, Source
from megatron_eve.data.sources.text import TextSource


@dataclass
class Text(Preparer):
    """A conversation a row: of "conversations" (or "messages"), or of FLAN's "inputs" and "targets".

    Rows of "text" stay texts. The other keys of a row go into `meta`.
    """

    name: ClassVar[str] = "text"
    what: ClassVar[str] = "FLAN and other instructions without pictures"
    layout: ClassVar[str] = (
        'JSON lines (.jsonl, .ndjson) of {"conversations"}, {"inputs", "targets"} or {"text"}'
    )

    def files(self) -> list[Path]:
        """All files of JSON lines."""
        return self.find("**/*.jsonl", "**/*.ndjson")

    def open(self, files: Sequence[Path]) -> Source:
        """A reader of the rows."""
        return _TextRows(files, self.allow_eval_splits)


class _TextRows(LlavaSource, TextSource):
    def __init__(self, files: Sequence[Path], allow_eval_splits: bool) -> None:
        super().__init__(files)
        self._allow_eval_splits = allow_eval_splits

    def _record(self, row: RawRow, fields: dict[str, Any]) -> Record:
        split = fields.get("split")
        if not self._allow_eval_splits and isinstance(split, str) and is_eval_split(split):
            raise SkipRow(EVAL_SPLIT, f"its split is {split}")
        layout: type[LlavaSource] | type[TextSource] = TextSource
        if any(key in fields for key in KEYS):
            layout = LlavaSource
        record = layout._record(self, row, fields)
        if record.images or record.video is not None:
            raise SkipRow("text_with_pictures", "it names a picture or a video")
        if record.kind == "conversation":
            check_answers(record)
        return replace(record, source=Text.name)
