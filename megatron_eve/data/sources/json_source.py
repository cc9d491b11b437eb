"""`JsonSource`, the base class of sources that read JSON files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import Record
from megatron_eve.data.sources.fields import parse_object
from megatron_eve.data.sources.json_reader import JsonReader
from megatron_eve.data.sources.source import RawRow, Source


class JsonSource(Source):
    """Rows of JSON lines (.jsonl, .ndjson) or of JSON arrays; a subclass turns a row into a record.

    Args:
        files: JSON files, see `JsonReader`.
        image_root: folder that image names are relative to.

    Raises:
        DataError: while iterating, a file cannot be read further; see `JsonReader`.
    """

    def rows(self) -> Iterator[RawRow]:
        """The JSON text of each row, as bytes in `payload`."""
        before = 0
        for file in self._files:
            with JsonReader(file) as reader:
                for number, text in reader.texts():
                    self._position = before + reader.position
                    yield RawRow(str(file), number, text)
                before += reader.num_bytes
                self._position = before

    def _make_record(self, row: RawRow) -> Record:
        fields = parse_object(row.payload)
        try:
            return self._record(row, fields)
        except SkipRow as skip:
            name, image = fields.get("id"), fields.get("image")
            image = fields.get("images") if image is None else image
            skip.id, skip.image = (None if given is None else str(given)[:300] for given in (name, image))
            raise

    @abstractmethod
    def _record(self, row: RawRow, fields: dict[str, object]) -> Record:
        """The record of a row with these fields; raises SkipRow if they do not fit the layout."""
