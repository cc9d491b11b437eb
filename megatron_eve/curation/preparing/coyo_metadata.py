"""COYO's metadata: 128 parquet files with a row for each pair. Which rows are selected, and where a row stands.

Columns (github.com/kakaobrain/coyo-dataset): id, url, text, width, height, image_phash, text_length, word_count,
num_tokens_bert, num_tokens_gpt, num_faces, clip_similarity_vitb32, clip_similarity_vitl14, nsfw_score_opennsfw2,
nsfw_score_gantman, watermark_score, aesthetic_score_laion_v2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pyarrow import parquet

from megatron_eve.data.errors import DataError
from megatron_eve.data.sources.row_groups import UNREADABLE, one_line

SIMILARITIES = ("clip_similarity_vitb32", "clip_similarity_vitl14")
_ROW_BITS = 40  # of a place in 64 bits; the others are the number of the file


@dataclass(frozen=True)
class CoyoSelection:
    """Which rows of each metadata file are selected; VILA's selection is 0.6 and 0.2.

    Attributes:
        min_clip_similarity: the sum of the two CLIP similarities must be larger; None for no limit.
        best_share: of the rows of a file, counted before any are left out, this share is selected, those with the
            largest sums; None for all.
    """

    min_clip_similarity: float | None = None
    best_share: float | None = None

    def rows(self, sums: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """Numbers of the selected rows of a file, in order.

        Args:
            sums: [rows] of the two similarities; of equal ones the first rows are taken, and NaN is not selected where
                there is a limit.
        """
        if self.min_clip_similarity is None and self.best_share is None:
            return np.arange(len(sums), dtype=np.int64)
        chosen = np.flatnonzero(~np.isnan(sums))
        if self.min_clip_similarity is not None:
            chosen = chosen[sums[chosen] > self.min_clip_similarity]
        if self.best_share is not None:
            most = int(len(sums) * self.best_share)
            chosen = np.sort(chosen[np.argsort(-sums[chosen], kind="stable")[:most]])
        return chosen.astype(np.int64)


class Place(NamedTuple):
    """A row of the metadata: number of its file, and its number in the file."""

    file: int
    row: int


class CoyoIndex:
    """Finds the selected rows of the metadata by id, or by URL and text. It takes 16 bytes a selected row.

    URLs occur several times with other texts, so they alone do not name a row.

    Args:
        files: of the metadata.
        selection: of their rows.
        by_id: rows are found by their id, otherwise by URL and text, of which 64 bits of a hash are kept.

    Raises:
        DataError: a file is damaged or lacks a column.
    """

    def __init__(self, files: Sequence[Path], selection: CoyoSelection, by_id: bool) -> None:
        self._by_id = by_id
        columns = ("id",) if by_id else ("url", "text")
        all_keys: list[NDArray[np.uint64]] = []
        all_places: list[NDArray[np.uint64]] = []
        for number, file in enumerate(files):
            table = _read(file, (*columns, *SIMILARITIES))
            first, second = (table[name].to_numpy() for name in SIMILARITIES)
            rows = selection.rows(first + second)
            table = table.take(rows)
            if by_id:
                keys = table["id"].to_numpy().astype(np.uint64)
            else:
                pairs = zip(table["url"].to_pylist(), table["text"].to_pylist(), strict=True)
                keys = np.fromiter((_digest(url, text) for url, text in pairs), np.uint64, len(rows))
            all_keys.append(keys)
            all_places.append(np.uint64(number << _ROW_BITS) | rows.astype(np.uint64))
        keys, places = np.concatenate(all_keys), np.concatenate(all_places)
        order = np.argsort(keys, kind="stable")  # of equal keys the first row is found
        self._keys, self._places = keys[order], places[order]

    def find(self, fields: Mapping[str, Any]) -> Place | None:
        """Where the row of a picture stands; None if it is not among those that are selected.

        Args:
            fields: the JSON beside the picture, with id, or url and caption.
        """
        name, url, text = fields.get("id"), fields.get("url"), fields.get("caption")
        if self._by_id:
            if not isinstance(name, int) or not 0 <= name < 1 << 64:
                return None
            key = name
        else:
            if not isinstance(url, str) or not isinstance(text, str):
                return None
            key = _digest(url, text)
        at = int(np.searchsorted(self._keys, np.uint64(key)))
        if at == len(self._keys) or int(self._keys[at]) != key:
            return None
        return Place(int(self._places[at]) >> _ROW_BITS, int(self._places[at]) & ((1 << _ROW_BITS) - 1))


class CoyoRows:
    """Reads rows of the metadata; the last row group stays in memory, as a download follows the order of the metadata.

    Args:
        files: of the metadata.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._group: tuple[int, int, int, Any] | None = None  # file, first row, end, table

    def row(self, place: Place) -> Mapping[str, Any]:
        """Columns of a row.

        Raises:
            DataError: the file is damaged.
        """
        if (
            self._group is None
            or self._group[0] != place.file
            or not self._group[1] <= place.row < self._group[2]
        ):
            self._group = self._read_group(place)
        _, first, _, table = self._group
        (fields,) = table.slice(place.row - first, 1).to_pylist()
        return dict(fields)

    def _read_group(self, place: Place) -> tuple[int, int, int, Any]:
        file = self._files[place.file]
        try:
            opened = parquet.ParquetFile(file)
            first = 0
            for group in range(opened.num_row_groups):
                end = first + opened.metadata.row_group(group).num_rows
                if place.row < end:
                    return place.file, first, end, opened.read_row_group(group)
                first = end
        except UNREADABLE as error:
            raise _damaged(file, error) from error
        raise DataError(f"{file} has changed since it was read: prepare into a new folder")


def _digest(url: str | None, text: str | None) -> int:
    """64 bits of a URL and a text."""
    joined = f"{url}\n{text}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little")


def _read(file: Path, columns: Sequence[str]) -> Any:
    try:
        there = parquet.read_schema(file).names
        if lacking := [name for name in columns if name not in there]:
            raise DataError(
                f"{file} has no column {lacking[0]}: give the metadata files of COYO-700M as they are published"
            )
        return parquet.read_table(file, columns=list(columns))
    except UNREADABLE as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(f"{file} is not a complete parquet file ({one_line(error)}): copy or download it again")
