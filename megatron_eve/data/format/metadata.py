"""The source of each sample: OUT_meta.parquet has one row for each sample, in the order of the samples.

    id       string   as the source calls the row
    source   string   a data set, a shard
    license  string   as the source gives it; null if it gives none
    meta     string   a JSON object with the other fields of the source, such as URL, author, scores

A merged dataset has no table of its own; its rows are those of its parts, in order.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from pyarrow import parquet

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.format.manifest import PARTIAL
from megatron_eve.data.schema import Record

META = "_meta.parquet"
"""Suffix of the table."""
META_SCHEMA = pyarrow.schema([(name, pyarrow.string()) for name in ("id", "source", "license", "meta")])

_ROWS = 10_000  # of a row group, at most
_BYTES = 1 << 20  # of text in a row group, and one row more
_MOST_LICENSES = 1000  # different licenses that a manifest counts
_LICENSE_KEYS = frozenset({"license", "licence", "licenses", "licences"})


class SampleMeta(NamedTuple):
    """One row of the table."""

    id: str | None
    source: str
    license: str | None
    meta: str


def sample_meta(record: Record) -> SampleMeta:
    """The row of the table for a record."""
    text = json.dumps(dict(record.meta), default=str)
    # A table cannot hold half of a surrogate pair.
    name = None if record.id is None else record.id.encode("utf-8", "replace").decode()
    return SampleMeta(name, record.source, license_of(record.meta), text)


def license_of(meta: Mapping[str, Any]) -> str | None:
    """The license in a row's metadata; None if there is none."""
    for key, value in meta.items():
        if key.lower() in _LICENSE_KEYS and isinstance(value, str) and value.strip():
            return value.strip().encode("utf-8", "replace").decode()
    return None


def largest_licenses(licenses: Counter[str]) -> dict[str, int]:
    """Counts of the 1,000 most frequent licenses, and of all others as "other"."""
    largest = dict(licenses.most_common(_MOST_LICENSES))
    if rest := licenses.total() - sum(largest.values()):
        largest["other"] = largest.get("other", 0) + rest
    return largest


class MetaWriter:
    """Writes OUT_meta.parquet under its temporary name, with constant memory.

    Args:
        prefix: of the dataset.

    Attributes:
        licenses: number of samples by license; after 1,000 different ones, further ones count as "other".
    """

    def __init__(self, prefix: str) -> None:
        self.licenses: Counter[str] = Counter()
        self._rows: list[SampleMeta] = []
        self._size = 0
        self._writer = parquet.ParquetWriter(prefix + META + PARTIAL, META_SCHEMA)

    def add(self, row: SampleMeta) -> None:
        """Append the row of the next sample."""
        if row.license is not None:
            known = row.license in self.licenses or len(self.licenses) < _MOST_LICENSES
            self.licenses[row.license if known else "other"] += 1
        self._rows.append(row)
        self._size += len(row.meta)
        if len(self._rows) == _ROWS or self._size >= _BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the end of the file."""
        self._flush()
        self._writer.close()

    def discard(self) -> None:
        """Close the file without finishing it."""
        self._writer.close()

    def _flush(self) -> None:
        columns = [list(column) for column in zip(*self._rows, strict=True)] or [[]] * len(META_SCHEMA)
        self._writer.write_table(pyarrow.table(columns, schema=META_SCHEMA))
        self._rows, self._size = [], 0


class Exclusions:
    """Filters rows by license (`licenses`) and by an opt-out list (`opt_out`).

    Args:
        licenses: shell patterns such as `*nc*`, matched without regard to case. A row without a license is kept.
        opt_out: a text file; each line is an id, a URL or the sha256 of an image file. Blank lines and lines that begin
            with # are ignored.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, licenses: tuple[str, ...], opt_out: str | None) -> None:
        self._licenses = tuple(pattern.lower() for pattern in licenses)
        self._out: frozenset[str] = frozenset()
        if opt_out is not None:
            try:
                lines = Path(opt_out).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(
                    f"--opt-out {opt_out} cannot be read ({error}): name a text file with an id, URL or sha256 a line"
                ) from error
            stripped = (line.strip() for line in lines)
            self._out = frozenset(line for line in stripped if line and not line.startswith("#"))
        self._digests = frozenset(line.lower() for line in self._out if _is_digest(line))

    def check(self, record: Record) -> None:
        """Raise SkipRow if a record's license, its id, or a URL or sha256 in its metadata is excluded.

        Raises:
            SkipRow: the row must be left out.
        """
        license_text = license_of(record.meta)
        if license_text is not None and any(
            fnmatchcase(license_text.lower(), pattern) for pattern in self._licenses
        ):
            raise SkipRow("license_dropped", license_text)
        if not self._out:
            return
        for value in (record.id, *_texts(record.meta), *(image.sha256 for image in record.images)):
            if value is not None and (value in self._out or value.lower() in self._digests):
                raise SkipRow("opted_out", value)

    def check_file(self, data: bytes) -> None:
        """Raise SkipRow if the sha256 of an image file is excluded.

        Raises:
            SkipRow: the row of the image must be left out.
        """
        if self._digests and (digest := hashlib.sha256(data).hexdigest()) in self._digests:
            raise SkipRow("opted_out", digest)


def _is_digest(line: str) -> bool:
    return len(line) == 64 and all(character in "0123456789abcdefABCDEF" for character in line)


def _texts(value: object) -> list[str]:
    """All strings in metadata, also in nested lists and objects."""
    found, left = [], [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, Mapping):
            left += one.values()
        elif isinstance(one, list):
            left += one
    return found
