"""Published downloads at toy size, and what preparers make of them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from megatron_eve.curation.preparing.config import PrepareConfig
from megatron_eve.curation.preparing.output import MANIFEST, SKIPPED, PreparedData
from megatron_eve.curation.preparing.prepare import prepare
from megatron_eve.curation.preparing.preparer import Preparer
from megatron_eve.data.schema import Record
from megatron_eve.data.sources.parquet import ParquetSource
from tests.data.helpers import encoded, picture


def jpeg(seed: int = 0, width: int = 32, height: int = 24) -> bytes:
    """A small photograph's file; another one for each seed."""
    return encoded(picture(width, height, seed=seed), "JPEG")


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """An uncompressed archive of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def run(preparer: Preparer, output: Path, **settings: Any) -> PreparedData:
    """Prepare without a bar."""
    return prepare(PrepareConfig(preparer=preparer, output=output, **settings), progress=False)


def records(output: Path) -> list[Record]:
    """The records of all shards, read as tools/preprocess_data.py reads them."""
    source = ParquetSource(sorted(output.glob("*.parquet")))
    return [source.record(row) for row in source.rows()]


def skipped(output: Path) -> list[tuple[str | None, str]]:
    """Id and reason of each row that was left out."""
    lines = (output / SKIPPED).read_text(encoding="utf-8").splitlines()
    return [(row["id"], row["reason"]) for row in map(json.loads, lines)]


def manifest(output: Path) -> dict[str, Any]:
    """The manifest's content."""
    content: dict[str, Any] = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    return content
