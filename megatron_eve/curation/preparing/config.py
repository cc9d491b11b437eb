"""What is prepared and how: the flags of tools/prepare_data.py."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eve.curation.preparing.preparer import Preparer
from megatron_eve.data.format.metadata import Exclusions


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What `prepare` is to do; the flags of tools/prepare_data.py.

    Attributes:
        preparer: reads the download.
        output: folder of the shards.
        rows_per_shard: rows of the download that go into one shard.
        workers: processes; 1 works in this one.
        drop_license: patterns; rows whose license matches one are left out.
        opt_out: a file of ids, URLs and sha256 of rows that are left out; see `metadata.Exclusions`.
        follow_links: read pictures that are links to files outside the download.
    """

    preparer: Preparer
    output: Path
    rows_per_shard: int = 5000
    workers: int = 1
    drop_license: tuple[str, ...] = ()
    opt_out: str | None = None
    follow_links: bool = False

    def settings(self, files: list[Path]) -> dict[str, Any]:
        """Everything that decides what is in the shards, as JSON values.

        Args:
            files: of the download.

        Raises:
            DataError: the file of --opt-out cannot be read.
        """
        Exclusions(self.drop_license, self.opt_out)
        out = None if self.opt_out is None else hashlib.sha256(Path(self.opt_out).read_bytes()).hexdigest()
        return {
            "name": self.preparer.name,
            "source files": _digest(files, self.preparer.folder),
            "rows_per_shard": self.rows_per_shard,
            "drop_license": list(self.drop_license),
            "opt_out": out,
            "follow_links": self.follow_links,
            **self.preparer.settings(),
        }


def _digest(files: list[Path], folder: Path) -> str:
    """SHA-256 of the names and sizes of files, relative to their folder, so that a download may be moved."""
    lines = [f"{file.relative_to(folder)}\t{file.stat().st_size}\n" for file in files]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
